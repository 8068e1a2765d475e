// The interface between torch and the kernels: plain pointers, sizes and a stream, so that kernels can be compiled and
// inspected without torch. Every launcher enqueues on `stream` and returns nullptr, or a message that says what failed.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

enum class YaongiType : int { float16, bfloat16, float32, float8_e4m3fn, float8_e5m2 };

// A batch of row-major matrices; strides count elements. `data` is nullptr if an optional argument is absent.
struct YaongiMatrices {
  void* data;
  int64_t batch, rows, columns, row_stride, batch_stride;
};

// out = alpha·x·yᵀ + beta·c for symmetric results; x, y (batch, m, n), c and out (batch, m, m), m and n multiples of 8.
const char* yaongi_symmetric_product(YaongiType type, const YaongiMatrices& x, const YaongiMatrices& y,
                                     const YaongiMatrices& c, const YaongiMatrices& out, float alpha, float beta,
                                     cudaStream_t stream);

// out = unit_a·unit_b · a·bᵀ + addend; a (M, K) and b (N, K) in 8-bit floats, out and addend (M, N) in bfloat16 or float32,
// which may be the same memory. The units are on the device, at multiples of 16 bytes. `exact`: sums are promoted to
// float32 within the product.
struct YaongiMatmul {
  YaongiMatrices a, b, addend, out;
  YaongiType a_type, b_type, out_type;
  const float *unit_a, *unit_b;
  bool exact;
  int device;
};

const char* yaongi_matmul(const YaongiMatmul& problem, void* workspace, size_t workspace_bytes, cudaStream_t stream);

// out[e] += Σ rows[k]ᵀ·gathered[token[k]] over the rows k from offset[e] to offset[e + 1]; rows (pairs, R) and gathered
// (tokens, G) in 16 bits, R and G multiples of 8, out (E, R, G) in float32. With gather_left the factors change places,
// and out is (E, G, R).
struct YaongiWeightGradient {
  YaongiMatrices rows, gathered, out;
  const int *token, *offset;
  YaongiType type;
  bool gather_left;
  bool wide;    // tiles of 128 × 256, else 256 × 128
  bool reduce;  // for experts with many rows
};

const char* yaongi_moe_weight_gradient(const YaongiWeightGradient& gradient, cudaStream_t stream);

// Version of the cuBLASLt that torch has loaded, such as 130101; 0 if there is none.
int64_t yaongi_cublaslt_version();
