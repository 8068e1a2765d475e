// Host side of TMA: encodes tensor maps without linking against the driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "yaongi.h"

namespace yaongi {

// The driver's encoder, looked up once through the runtime; nullptr if there is no driver.
inline auto tensor_map_encoder() {
  using Encoder = decltype(&cuTensorMapEncodeTiled);
  static const Encoder encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<Encoder>(function);
  }();
  return encoder;
}

// Encodes a map of a batch of matrices, in 16 bits or float32, for boxes of box_rows × 128 bytes with 128-byte swizzle;
// elements outside the matrices are loaded as zero and not stored.
inline bool make_tensor_map(CUtensorMap* map, YaongiType type, const YaongiMatrices& t, uint32_t box_rows) {
  const auto encoder = tensor_map_encoder();
  const cuuint32_t size = type == YaongiType::float32 ? 4 : 2;
  const cuuint64_t sizes[3] = {cuuint64_t(t.columns), cuuint64_t(t.rows), cuuint64_t(t.batch)};
  const cuuint64_t strides[2] = {cuuint64_t(t.row_stride) * size, cuuint64_t(t.batch_stride) * size};  // bytes
  const cuuint32_t box[3] = {128 / size, box_rows, 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  const auto element = type == YaongiType::float32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                       : type == YaongiType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                      : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encoder && encoder(map, element, 3, t.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                            CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace yaongi
