// The interface between torch and the kernels: plain pointers, sizes and a stream, so that kernels can be compiled and
// inspected without torch. Every launcher enqueues on `stream` and returns nullptr, or a message that says what failed.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

enum class YaongiType : int { float16, bfloat16 };

// A batch of row-major matrices; strides count elements. `data` is nullptr if an optional argument is absent.
struct YaongiMatrices {
  void* data;
  int64_t batch, rows, columns, row_stride, batch_stride;
};

// out = alpha·x·yᵀ + beta·c for symmetric results; x, y (batch, m, n), c and out (batch, m, m), m and n multiples of 8.
const char* yaongi_symmetric_product(YaongiType type, const YaongiMatrices& x, const YaongiMatrices& y,
                                     const YaongiMatrices& c, const YaongiMatrices& out, float alpha, float beta,
                                     cudaStream_t stream);
