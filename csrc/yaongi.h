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

// The gradients of a Mamba-2 scan in bfloat16, P 64, N 128, chunks of 64 tokens; H = groups · heads, of 4 or 8 heads a
// group, padded = L rounded up to whole chunks. Blocks: B · groups · segments · heads / 4, a part of a group.
struct YaongiScanBackward {
  YaongiMatrices x, dy, dx;        // (B, L, H·P)
  YaongiMatrices b, c, db, dc;     // (B, L, groups·N)
  YaongiMatrices states;           // (B·H·chunks, N, P): the state at each chunk's entry
  const float* steps;              // (B, H, 4, padded): see mamba_scan/decays.py
  const float* D;                  // (H), or nullptr
  const float* entry;              // (segments, B, H, P, N): the gradient at each segment's end; nullptr for zeros
  float* first;                    // (B, H, P, N): the gradient of the row's first state; or nullptr
  float* sums;                     // (B, H, padded, 4): x·du·δ, da_k's terms for tokens ≥ k, those for tokens < k, dy·x
  float* passed;                   // (blocks, 32768): room for the sums that parts of a group pass on
  int* flags;                      // (blocks): set to 1 where a result is not finite; or nullptr
  int groups, heads, segments, chunks_per_segment, padded;
};

const char* yaongi_mamba_scan_backward(const YaongiScanBackward& scan, cudaStream_t stream);

// Version of the cuBLASLt that torch has loaded, such as 130101; 0 if there is none.
int64_t yaongi_cublaslt_version();
