// Torch's side of yaongi.h, on the LibTorch stable ABI: unpacks tensors, guards the device, finds the stream. Arguments
// are checked and results allocated in Python.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "yaongi.h"

using torch::stable::Tensor;

// Defined in libtorch_cuda; weak, so that this library also loads with a CPU build of torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace {

cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  if (!aoti_torch_get_current_cuda_stream ||
      aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("yaongi: this build of torch has no CUDA streams");
  return static_cast<cudaStream_t>(stream);
}

void raise_on_failure(const char* op, const char* message) {
  if (message) throw std::runtime_error(std::string(op) + ": " + message);
}

YaongiType type_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return YaongiType::bfloat16;
    case ScalarType::Float: return YaongiType::float32;
    case ScalarType::Float8_e4m3fn: return YaongiType::float8_e4m3fn;
    case ScalarType::Float8_e5m2: return YaongiType::float8_e5m2;
    default: return YaongiType::float16;
  }
}

// (…, rows, columns): Python has checked that the leading dimensions can be flattened into one.
YaongiMatrices matrices(const Tensor& t) {
  const int64_t dims = t.dim(), rows = t.size(dims - 2), columns = t.size(dims - 1);
  const int64_t row_stride = rows > 1 ? t.stride(dims - 2) : columns;  // that of a single row may be anything
  int64_t batch = 1;
  for (int64_t i = 0; i < dims - 2; ++i) batch *= t.size(i);
  const int64_t batch_stride = dims > 2 && batch > 1 ? t.stride(dims - 3) : rows * row_stride;
  return {t.data_ptr(), batch, rows, columns, row_stride, batch_stride};
}

YaongiMatrices matrices(const std::optional<Tensor>& t) { return t ? matrices(*t) : YaongiMatrices{}; }

void symmetric_product(Tensor x, std::optional<Tensor> y, std::optional<Tensor> c, double alpha, double beta,
                       Tensor out) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  raise_on_failure("symmetric_product",
                   yaongi_symmetric_product(type_of(x), matrices(x), matrices(y), matrices(c), matrices(out),
                                            static_cast<float>(alpha), static_cast<float>(beta), current_stream(x)));
}

void matmul8(Tensor a, Tensor b, Tensor unit_a, Tensor unit_b, std::optional<Tensor> addend, Tensor out, bool exact,
             Tensor workspace) {
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  const YaongiMatmul problem = {matrices(a),
                                matrices(b),
                                matrices(addend),
                                matrices(out),
                                type_of(a),
                                type_of(b),
                                type_of(out),
                                static_cast<const float*>(unit_a.data_ptr()),
                                static_cast<const float*>(unit_b.data_ptr()),
                                exact,
                                static_cast<int>(a.get_device_index())};
  raise_on_failure("matmul8", yaongi_matmul(problem, workspace.data_ptr(), workspace.numel(), current_stream(a)));
}

void moe_weight_gradient(Tensor rows, Tensor gathered, Tensor token, Tensor offset, Tensor out, bool gather_left,
                         bool wide, bool reduce) {
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  const YaongiWeightGradient gradient = {matrices(rows),
                                         matrices(gathered),
                                         matrices(out),
                                         static_cast<const int*>(token.data_ptr()),
                                         static_cast<const int*>(offset.data_ptr()),
                                         type_of(rows),
                                         gather_left,
                                         wide,
                                         reduce};
  raise_on_failure("moe_weight_gradient", yaongi_moe_weight_gradient(gradient, current_stream(rows)));
}

template <class T>
T* data_or_null(const std::optional<Tensor>& t) {
  return t ? static_cast<T*>(t->data_ptr()) : nullptr;
}

void mamba_scan_backward(Tensor x, Tensor dy, Tensor b, Tensor c, Tensor states, Tensor steps, std::optional<Tensor> D,
                         std::optional<Tensor> entry, std::optional<Tensor> first, Tensor dx, Tensor db, Tensor dc,
                         Tensor sums, Tensor passed, std::optional<Tensor> flags, int64_t groups,
                         int64_t segments, int64_t chunks_per_segment) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const YaongiScanBackward scan = {matrices(x),
                                   matrices(dy),
                                   matrices(dx),
                                   matrices(b),
                                   matrices(c),
                                   matrices(db),
                                   matrices(dc),
                                   matrices(states),
                                   static_cast<const float*>(steps.data_ptr()),
                                   data_or_null<float>(D),
                                   data_or_null<float>(entry),
                                   data_or_null<float>(first),
                                   static_cast<float*>(sums.data_ptr()),
                                   static_cast<float*>(passed.data_ptr()),
                                   data_or_null<int>(flags),
                                   static_cast<int>(groups),
                                   static_cast<int>(steps.size(1) / groups),
                                   static_cast<int>(segments),
                                   static_cast<int>(chunks_per_segment),
                                   static_cast<int>(steps.size(3))};
  raise_on_failure("mamba_scan_backward", yaongi_mamba_scan_backward(scan, current_stream(x)));
}

int64_t cublaslt_version() { return yaongi_cublaslt_version(); }

}  // namespace

STABLE_TORCH_LIBRARY(yaongi_cuda, library) {
  library.def(
      "matmul8(Tensor a, Tensor b, Tensor unit_a, Tensor unit_b, Tensor? addend, Tensor(a!) out, bool exact, "
      "Tensor workspace) -> ()");
  library.def("cublaslt_version() -> int");
  library.def(
      "mamba_scan_backward(Tensor x, Tensor dy, Tensor b, Tensor c, Tensor states, Tensor steps, Tensor? D, "
      "Tensor? entry, Tensor(a!)? first, Tensor(b!) dx, Tensor(c!) db, Tensor(d!) dc, Tensor(e!) sums, "
      "Tensor(f!) passed, Tensor(g!)? flags, int groups, int segments, int chunks_per_segment) -> ()");
  library.def(
      "moe_weight_gradient(Tensor rows, Tensor gathered, Tensor token, Tensor offset, Tensor(a!) out, "
      "bool gather_left, bool wide, bool reduce) -> ()");
  library.def("symmetric_product(Tensor x, Tensor? y, Tensor? c, float alpha, float beta, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(yaongi_cuda, CUDA, library) {
  library.impl("symmetric_product", TORCH_BOX(&symmetric_product));
  library.impl("matmul8", TORCH_BOX(&matmul8));
  library.impl("mamba_scan_backward", TORCH_BOX(&mamba_scan_backward));
  library.impl("moe_weight_gradient", TORCH_BOX(&moe_weight_gradient));
}

STABLE_TORCH_LIBRARY_IMPL(yaongi_cuda, CompositeExplicitAutograd, library) {
  library.impl("cublaslt_version", TORCH_BOX(&cublaslt_version));
}
