// Tiles of 16-bit elements in shared memory: panels of 64 columns (128 bytes per row) with the 128-byte swizzle, which
// TMA writes, wgmma reads, and stmatrix writes without bank conflicts.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace yaongi {

constexpr int PANEL_COLUMNS = 64;
constexpr int PANEL_ROW_BYTES = 128;

// Byte offset of 16-byte chunk `chunk` (0..7) of `row` within a panel aligned to 1024 bytes.
__device__ __forceinline__ uint32_t swizzled_offset(uint32_t row, uint32_t chunk) {
  return row * PANEL_ROW_BYTES + ((chunk ^ (row & 7)) << 4);
}

// wgmma descriptor of a K-major operand in such a panel: start address, 1024 bytes between groups of 8 rows, 128-byte
// swizzle. To move on by 16 columns, or 32 bytes, add 2 to the descriptor.
__device__ __forceinline__ uint64_t panel_descriptor(uint32_t shared_address) {
  constexpr uint64_t LEADING_BYTES = 16, GROUP_BYTES = 1024, SWIZZLE_128 = 1;
  return (shared_address & 0x3FFFF) >> 4 | (LEADING_BYTES >> 4) << 16 | (GROUP_BYTES >> 4) << 32 | SWIZZLE_128 << 62;
}

// wgmma descriptor of an operand that lies transposed: rows of the product's inner dimension, its columns in panels of
// PANEL_BYTES. To move on by 16 rows, or 2048 bytes, add 128 to the descriptor.
template <int PANEL_BYTES>
__device__ __forceinline__ uint64_t transposed_descriptor(uint32_t shared_address) {
  constexpr uint64_t LEADING_BYTES = PANEL_BYTES, GROUP_BYTES = 1024, SWIZZLE_128 = 1;
  return (shared_address & 0x3FFFF) >> 4 | (LEADING_BYTES >> 4) << 16 | (GROUP_BYTES >> 4) << 32 | SWIZZLE_128 << 62;
}

// pack converts two floats to two 16-bit elements, the first in the low half; unpack converts them back.
template <bool BFLOAT16>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (BFLOAT16) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
  } else {
    __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
  }
}

template <bool BFLOAT16>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (BFLOAT16) {
    return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&pair));
  } else {
    return __half22float2(*reinterpret_cast<__half2*>(&pair));
  }
}

}  // namespace yaongi
