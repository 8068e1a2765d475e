// The asm statements of the project, one instruction per function; some of its matrix products are in products.cuh. Names
// and operands follow the PTX ISA.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace yaongi::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- clusters -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of the cluster arrive and wait; this orders shared-memory writes and barrier initialisation.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// ---- mbarriers ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives on the barrier at the same shared-memory offset in block `rank` of the cluster. It orders execution only,
// which is enough for reads by wgmma; .release.cluster would cost a GPU-wide fence.
__device__ __forceinline__ void barrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// The same; what this thread has written or seen before can be read, in memory too, by who waits with barrier_acquire.
__device__ __forceinline__ void barrier_release_at(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ bool barrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred done;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done;
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!barrier_try_wait(barrier, parity)) {
  }
}

__device__ __forceinline__ void barrier_acquire(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

__device__ __forceinline__ void named_barrier_sync(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- TMA ------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void tma_load_3d(void* shared, const CUtensorMap* map, uint64_t* barrier, int x, int y,
                                            int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// Writes the box to the same shared-memory offset in every block of `mask`, and completes on each block's barrier.
__device__ __forceinline__ void tma_load_3d_multicast(void* shared, const CUtensorMap* map, uint64_t* barrier,
                                                      uint16_t mask, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "h"(mask), "r"(x), "r"(y), "r"(z)
      : "memory");
}

__device__ __forceinline__ void tma_store_3d(const CUtensorMap* map, const void* shared, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
               "r"(shared_address(shared)), "r"(x), "r"(y), "r"(z)
               : "memory");
}

// Brings a box into the L2 cache.
__device__ __forceinline__ void tma_prefetch_3d(const CUtensorMap* map, int x, int y, int z) {
  asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global [%0, {%1, %2, %3}];" ::"l"(map), "r"(x), "r"(y), "r"(z)
               : "memory");
}

// Copies of contiguous memory, by multiples of 16 bytes.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Adds the box, in float32, to what is in memory.
__device__ __forceinline__ void tma_add_3d(const CUtensorMap* map, const void* shared, int x, int y, int z) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
      "r"(shared_address(shared)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all but the last PENDING of this thread's stores have read their shared memory; it can then be reused.
template <int PENDING>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Makes this thread's ordinary shared-memory writes visible to TMA and the tensor cores.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- copies of single threads ---------------------------------------------------------------------------------------

// Copies 16 bytes to shared memory in the background; zeros if not `inside`.
__device__ __forceinline__ void copy_16_bytes(uint32_t shared, const void* source, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(source), "r"(inside ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the last PENDING committed groups of this thread's copies have landed.
template <int PENDING>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- programmatic dependent launch ----------------------------------------------------------------------------------

// Waits until the previous kernels in the stream are done and their writes are visible. Returns at once unless this
// kernel was launched with early start.
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the next kernel, if launched with early start, begin on multiprocessors as this kernel's blocks leave them.
__device__ __forceinline__ void allow_next_kernel() { asm volatile("griddepcontrol.launch_dependents;"); }

// ---- matrix fragments in shared memory ------------------------------------------------------------------------------

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&v)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void stmatrix_x4(uint32_t address, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}

__device__ __forceinline__ void stmatrix_x4_transposed(uint32_t address, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]),
               "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

// Transposes an 8 × 8 matrix of 16-bit elements that a warp holds as two elements per lane.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t v) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(v));
  return transposed;
}

// A load that the compiler doesn't move, so that it stays ahead of the work that hides its latency. It avoids the
// read-only path (.nc), because a kernel that starts early runs while the previous one may still write.
__device__ __forceinline__ uint32_t load_in_place(const void* address) {
  uint32_t v;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(v) : "l"(address));
  return v;
}

// A load from L2, where other multiprocessors' writes are.
__device__ __forceinline__ float4 load_float4(const float4* address) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(address)
               : "memory");
  return v;
}

// ---- warpgroups and their matrix products ---------------------------------------------------------------------------

template <int REGISTERS>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define YAONGI_D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define YAONGI_D16(d, i) YAONGI_D4(d, i), YAONGI_D4(d, i + 4), YAONGI_D4(d, i + 8), YAONGI_D4(d, i + 12)

// d (64 × 256, fp32) = a (64 × 16) · b (256 × 16)ᵀ + (accumulate ? d : 0); a, b: descriptors of shared memory.
// TRANSPOSED: "0, 0" for K-major operands, "1, 1" for operands that lie as (16, 64) and (16, 256).
#define YAONGI_WGMMA_M64N256K16(TYPE, TRANSPOSED)                                                                      \
  asm volatile(                                                                                                        \
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %130, 0;\n"                                                  \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE                                                     \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17,"                              \
      " %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35,"                     \
      " %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53,"                     \
      " %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71,"                     \
      " %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89,"                     \
      " %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107,"             \
      " %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125,"   \
      " %126, %127},"                                                                                                  \
      " %128, %129, accumulate, 1, 1, " TRANSPOSED ";\n}"                                                              \
      : YAONGI_D16(d, 0), YAONGI_D16(d, 16), YAONGI_D16(d, 32), YAONGI_D16(d, 48),                                     \
        YAONGI_D16(d, 64), YAONGI_D16(d, 80), YAONGI_D16(d, 96), YAONGI_D16(d, 112)                                    \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

// The same for d (64 × 128) and b (128 × 16).
#define YAONGI_WGMMA_M64N128K16(TYPE, TRANSPOSED)                                                                      \
  asm volatile(                                                                                                        \
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %66, 0;\n"                                                   \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                                                     \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17,"                              \
      " %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35,"                     \
      " %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53,"                     \
      " %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, accumulate, 1, 1, " TRANSPOSED ";\n}"             \
      : YAONGI_D16(d, 0), YAONGI_D16(d, 16), YAONGI_D16(d, 32), YAONGI_D16(d, 48)                                      \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

template <bool BFLOAT16>
__device__ __forceinline__ void wgmma_m64n256k16(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (BFLOAT16) {
    YAONGI_WGMMA_M64N256K16("bf16", "0, 0");
  } else {
    YAONGI_WGMMA_M64N256K16("f16", "0, 0");
  }
}

// Products of transposed operands; the accumulator's size tells the shape.
template <bool BFLOAT16>
__device__ __forceinline__ void wgmma_transposed(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (BFLOAT16) {
    YAONGI_WGMMA_M64N256K16("bf16", "1, 1");
  } else {
    YAONGI_WGMMA_M64N256K16("f16", "1, 1");
  }
}

template <bool BFLOAT16>
__device__ __forceinline__ void wgmma_transposed(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (BFLOAT16) {
    YAONGI_WGMMA_M64N128K16("bf16", "1, 1");
  } else {
    YAONGI_WGMMA_M64N128K16("f16", "1, 1");
  }
}

#undef YAONGI_WGMMA_M64N128K16
#undef YAONGI_WGMMA_M64N256K16
#undef YAONGI_D16
#undef YAONGI_D4

}  // namespace yaongi::ptx
