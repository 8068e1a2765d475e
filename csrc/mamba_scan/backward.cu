// The Mamba-2 scan's backward pass: a reverse walk over the chunks of a sequence. The mathematics, and the letters, are
// those of yaongi/kernels/mamba_scan/README.md; S is K there.
//
// A block takes one segment of one row of the batch, and four heads of a group, a part. In each chunk of 64 tokens it
// takes one head after another: a step is a head of a chunk. Three warpgroups share a step:
//
//     outputs   e·dy; dC += (e·dy)·h; S = c·bᵀ once a chunk; mix = E∘S; dS += E∘(dy·xᵀ)
//     inputs    dx from mixᵀ·dy and b·g; dB += (o·x)·g
//     state     g ← t·g + cᵀ·(e·dy), and t·⟨g, h⟩
//
// g stays in shared memory from the first chunk to the last. dB and dC are sums over the heads in registers. The parts of
// a group are a cluster of blocks: each is a chunk behind the one before, and starts a chunk's dB and dC from its sums. So
// every sum has one order. Producer threads bring a step's operands two steps ahead, and take away dx and the sums that
// the gradients of dt and of the decays are made from.
#include "common/tma.h"
#include "mamba_scan/copies.cuh"
#include "mamba_scan/inputs.cuh"
#include "mamba_scan/outputs.cuh"
#include "mamba_scan/state.cuh"

namespace yaongi {
namespace {

__device__ __forceinline__ void prepare(Shared& s, const Problem& p) {
  const int part = blockIdx.x % p.parts, walk = blockIdx.x / p.parts;
  const int row = walk / p.segments, segment = walk % p.segments, first = segment * p.chunks_per_segment;
  const int group = row % p.groups, head = (group * p.parts + part) * HEADS;
  s.place = {row / p.groups, group, segment, part, head, first, min(p.chunks_per_segment, p.chunks - first)};
  for (int i = 0; i < STAGES; ++i) {
    ptx::barrier_init(&s.ring.full[i], 1);
    ptx::barrier_init(&s.ring.empty[i], 1);
    ptx::barrier_init(&s.done[i], SIDES * WARPS);
  }
  for (int i = 0; i < HEADS; ++i) {
    ptx::barrier_init(&s.g_read[i], WARPS);
    ptx::barrier_init(&s.g_written[i], WARPS);
  }
  for (int i = 0; i < SLOTS; ++i) {
    ptx::barrier_init(&s.sent[i], 2 * WARPS);
    ptx::barrier_init(&s.received[i], 1);
    ptx::barrier_init(&s.vacated[i], 2 * WARPS);
  }
  for (uint64_t* barrier : {&s.edy_written, &s.edy_read, &s.mix_written, &s.mix_read}) ptx::barrier_init(barrier, WARPS);
  ptx::barrier_init(&s.chunk_full, 1);
  ptx::barrier_init(&s.chunk_empty, SIDES * WARPS);
  ptx::fence_barrier_init();
}

__global__ void __launch_bounds__(THREADS, 1)
    mamba_scan_backward_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap dy,
                               const __grid_constant__ CUtensorMap b, const __grid_constant__ CUtensorMap c,
                               const __grid_constant__ CUtensorMap h, const __grid_constant__ CUtensorMap dx,
                               const __grid_constant__ CUtensorMap db, const __grid_constant__ CUtensorMap dc,
                               const __grid_constant__ Problem p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  const uint32_t warpgroup = threadIdx.x / WARPGROUP, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) prepare(s, p);
  __syncthreads();
  split_entry(s, p);
  ptx::cluster_sync();
  if (warpgroup == 0) {
    ptx::decrease_registers<24>();
    if (warp == 0 && lane == 0) load_operands(s, p, &x, &dy, &h);
    if (warp == 1 && lane == 0) load_chunks(s, &b, &c);
    if (warp == 2) store_steps(s, p, lane, &dx);
    if (warp == 3 && lane == 0 && !is_last(s, p)) pass_on(s);
  } else if (warpgroup == 1) {
    ptx::increase_registers<216>();
    outputs_side(s, p, Thread(threadIdx.x), &dc);
  } else if (warpgroup == 2) {
    ptx::increase_registers<176>();
    inputs_side(s, p, Thread(threadIdx.x), &db);
  } else {
    ptx::decrease_registers<96>();
    state_side(s, p, Thread(threadIdx.x));
  }
  __syncwarp();
  ptx::cluster_sync();  // no block may exit while another still arrives at its barriers
}

const char* launch(const YaongiScanBackward& t, cudaStream_t stream) {
  const YaongiMatrices operands[] = {t.x, t.dy, t.b, t.c, t.states, t.dx, t.db, t.dc};
  const uint32_t rows[] = {Q, Q, Q, Q, N, Q, Q / WARPS, Q / WARPS};
  CUtensorMap maps[8];
  for (int i = 0; i < 8; ++i)
    if (!make_tensor_map(&maps[i], YaongiType::bfloat16, operands[i], rows[i])) return "the driver refused a tensor map";
  const int parts = t.heads / HEADS;
  float4* passed = reinterpret_cast<float4*>(t.passed);
  const Problem p = {t.steps,  t.D,   t.entry,    t.first,      passed,               t.sums,  t.flags,
                     t.groups, parts, t.segments, t.padded / Q, t.chunks_per_segment, t.padded};
  constexpr int BYTES = sizeof(Shared);
  const auto kernel = mamba_scan_backward_kernel;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
  if (error) return cudaGetErrorString(error);
  cudaLaunchAttribute cluster = {cudaLaunchAttributeClusterDimension};
  cluster.val.clusterDim = {static_cast<unsigned>(parts), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(t.x.batch) * t.groups * t.segments * parts);
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = BYTES;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel, maps[0], maps[1], maps[2], maps[3], maps[4], maps[5], maps[6], maps[7], p);
  return error ? cudaGetErrorString(error) : nullptr;
}

}  // namespace
}  // namespace yaongi

const char* yaongi_mamba_scan_backward(const YaongiScanBackward& scan, cudaStream_t stream) {
  return yaongi::launch(scan, stream);
}
