// A stand-in for libcublasLt on the CPU, for what csrc/cublaslt.cpp calls: column-major products in float32 by the
// documented meaning of each argument. It refuses what cuBLASLt refuses on Hopper for FP8: anything but a transposed A and
// a plain B, leading dimensions that aren't multiples of 16 bytes, alignments that the addresses don't have, and scales
// that don't lie at multiples of 16 bytes (seen on an H100).
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace {

struct Descriptor {
  int compute, scale;
  int32_t transa = 0, transb = 0;
  const float *scale_a = nullptr, *scale_b = nullptr;
  int8_t fast = 0;
};
struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t leading;
};
struct Preference {
  uint64_t workspace = 0;
  uint32_t alignments[4] = {256, 256, 256, 256};
};
struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};

int alive = 0, heuristics = 0, handles = 0, fast_calls = 0;

float value(const void* data, int type, int64_t i) {
  if (type == 0) return static_cast<const float*>(data)[i];
  if (type == 14) {
    const uint32_t bits = uint32_t(static_cast<const uint16_t*>(data)[i]) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
  }
  const uint8_t byte = static_cast<const uint8_t*>(data)[i];
  const int mantissa_bits = type == 28 ? 3 : 2, bias = type == 28 ? 7 : 15;
  const int exponent = (byte & 127) >> mantissa_bits, mantissa = byte & ((1 << mantissa_bits) - 1);
  const float fraction = float(mantissa) / float(1 << mantissa_bits);
  const float size = exponent ? std::ldexp(1 + fraction, exponent - bias) : std::ldexp(fraction, 1 - bias);
  return byte & 128 ? -size : size;
}

int bytes(int type) { return type == 0 ? 4 : type == 14 ? 2 : 1; }

// Where a descriptor's or preference's attribute lies, and its size; nullptr for a number that isn't one.
void* attribute_of(Descriptor* d, int attribute, size_t* size) {
  *size = attribute == 17 || attribute == 18 ? 8 : attribute == 25 ? 1 : 4;
  switch (attribute) {
    case 3: return &d->transa;
    case 4: return &d->transb;
    case 17: return &d->scale_a;
    case 18: return &d->scale_b;
    case 25: return &d->fast;
    default: return nullptr;
  }
}

void* attribute_of(Preference* p, int attribute, size_t* size) {
  *size = attribute == 1 ? 8 : 4;
  if (attribute == 1) return &p->workspace;
  return attribute >= 5 && attribute <= 8 ? &p->alignments[attribute - 5] : nullptr;
}

template <typename Object>
int set(Object* object, int attribute, const void* from, size_t size) {
  size_t wanted;
  void* place = attribute_of(object, attribute, &wanted);
  if (!place || size != wanted) return 7;  // CUBLAS_STATUS_INVALID_VALUE
  std::memcpy(place, from, size);
  return 0;
}

template <typename Object>
int get(Object* object, int attribute, void* to, size_t size, size_t* written) {
  size_t wanted;
  void* place = attribute_of(object, attribute, &wanted);
  if (!place || size < wanted) return 7;
  std::memcpy(to, place, wanted);
  *written = wanted;
  return 0;
}

template <typename Object>
int destroy(Object* object) {
  --alive;
  delete object;
  return 0;
}

}  // namespace

extern "C" {

int counts(int which) { return which == 0 ? alive : which == 1 ? heuristics : which == 2 ? handles : fast_calls; }

size_t cublasLtGetVersion() { return 130101; }
int cublasLtCreate(void** handle) {
  *handle = &handles;
  ++handles;
  return 0;
}
int cublasLtMatmulDescCreate(Descriptor** d, int compute, int scale) {
  ++alive;
  *d = new Descriptor{compute, scale};
  return compute == 68 && scale == 0 ? 0 : 15;  // CUBLAS_STATUS_NOT_SUPPORTED
}
int cublasLtMatmulDescDestroy(Descriptor* d) { return destroy(d); }
int cublasLtMatmulDescSetAttribute(Descriptor* d, int a, const void* v, size_t n) { return set(d, a, v, n); }
int cublasLtMatmulDescGetAttribute(Descriptor* d, int a, void* v, size_t n, size_t* w) { return get(d, a, v, n, w); }
int cublasLtMatrixLayoutCreate(Layout** l, int type, uint64_t rows, uint64_t columns, int64_t leading) {
  ++alive;
  *l = new Layout{type, rows, columns, leading};
  return 0;
}
int cublasLtMatrixLayoutDestroy(Layout* l) { return destroy(l); }
int cublasLtMatmulPreferenceCreate(Preference** p) {
  ++alive;
  *p = new Preference;
  return 0;
}
int cublasLtMatmulPreferenceDestroy(Preference* p) { return destroy(p); }
int cublasLtMatmulPreferenceSetAttribute(Preference* p, int a, const void* v, size_t n) { return set(p, a, v, n); }
int cublasLtMatmulPreferenceGetAttribute(Preference* p, int a, void* v, size_t n, size_t* w) {
  return get(p, a, v, n, w);
}

int cublasLtMatmulAlgoGetHeuristic(void*, Descriptor* op, Layout* a, Layout* b, Layout* c, Layout* d, Preference* p,
                                   int wanted, Heuristic* results, int* found) {
  ++heuristics;
  *found = 0;
  const bool fp8 = (a->type == 28 || a->type == 29) && (b->type == 28 || b->type == 29) && a->type + b->type < 58;
  if (!fp8 || op->transa != 1 || op->transb != 0 || c->type != d->type || wanted < 1) return 15;
  if (a->rows != b->rows || a->columns != d->rows || b->columns != d->columns || c->rows != d->rows) return 7;
  for (const Layout* l : {a, b, c, d})
    if (l->leading < int64_t(l->rows) || l->leading * bytes(l->type) % 16) return 15;
  std::memset(results, 0, sizeof(Heuristic));
  for (int i = 0; i < 4; ++i) results->algorithm.data[i] = p->alignments[i];
  results->algorithm.data[4] = p->workspace;
  *found = 1;
  return 0;
}

int cublasLtMatmul(void* handle, Descriptor* op, const float* alpha, const void* a, Layout* la, const void* b,
                   Layout* lb, const float* beta, const void* c, Layout* lc, void* d, Layout* ld,
                   const Algorithm* algorithm, void* workspace, size_t workspace_bytes, void*) {
  const void* addresses[] = {a, b, c, d};
  for (int i = 0; i < 4; ++i)
    if (!algorithm->data[i] || uintptr_t(addresses[i]) % algorithm->data[i]) return 7;
  if (handle != &handles || !workspace || algorithm->data[4] > workspace_bytes) return 7;
  if (!op->scale_a || !op->scale_b || (uintptr_t(op->scale_a) | uintptr_t(op->scale_b)) % 16) return 7;
  fast_calls += op->fast;
  for (uint64_t i = 0; i < ld->rows; ++i)
    for (uint64_t j = 0; j < ld->columns; ++j) {
      float sum = 0;
      for (uint64_t k = 0; k < la->rows; ++k)
        sum += value(a, la->type, i * la->leading + k) * value(b, lb->type, j * lb->leading + k);
      sum *= *alpha * *op->scale_a * *op->scale_b;
      if (*beta) sum += *beta * value(c, lc->type, j * lc->leading + i);
      if (ld->type == 0) static_cast<float*>(d)[j * ld->leading + i] = sum;
      else {
        uint32_t bits;
        std::memcpy(&bits, &sum, 4);
        static_cast<uint16_t*>(d)[j * ld->leading + i] = uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
      }
    }
  return 0;
}

}  // extern "C"
