// Products of bfloat16 by a warpgroup, 64 × N · 16: operands of either orientation in shared memory, or the left one in
// registers.
#pragma once

#include <cstdint>

namespace yaongi {

#define YAONGI_D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define YAONGI_D16(d, i) YAONGI_D4(d, i), YAONGI_D4(d, i + 4), YAONGI_D4(d, i + 8), YAONGI_D4(d, i + 12)
#define YAONGI_R32                                                                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24," \
  " %25, %26, %27, %28, %29, %30, %31"
#define YAONGI_R64                                                                                                     \
  YAONGI_R32                                                                                                           \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53,"    \
  " %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d (64 × N) = a (64 × 16) · b (16 × N) + (accumulate ? d : 0). TRANSPOSED_A: a lies as (16, 64). TRANSPOSED_B: b lies as
// (16, N), else as (N, 16).
template <int TRANSPOSED_A, int TRANSPOSED_B>
__device__ __forceinline__ void multiply(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" YAONGI_R32 "}, %32, %33, accumulate, 1, 1, %35, %36;\n}"
      : YAONGI_D16(d, 0), YAONGI_D16(d, 16)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(TRANSPOSED_A), "n"(TRANSPOSED_B));
}

template <int TRANSPOSED_A, int TRANSPOSED_B>
__device__ __forceinline__ void multiply(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" YAONGI_R64 "}, %64, %65, accumulate, 1, 1, %67, %68;\n}"
      : YAONGI_D16(d, 0), YAONGI_D16(d, 16), YAONGI_D16(d, 32), YAONGI_D16(d, 48)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(TRANSPOSED_A), "n"(TRANSPOSED_B));
}

template <int TRANSPOSED_B>
__device__ __forceinline__ void multiply(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" YAONGI_R64
      "}, {%64, %65, %66, %67}, %68, accumulate, 1, 1, %70;\n}"
      : YAONGI_D16(d, 0), YAONGI_D16(d, 16), YAONGI_D16(d, 32), YAONGI_D16(d, 48)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), "n"(TRANSPOSED_B));
}

#undef YAONGI_R64
#undef YAONGI_R32
#undef YAONGI_D16
#undef YAONGI_D4

}  // namespace yaongi
