// FP8 products by the cuBLASLt that torch has loaded. Its header lies in a wheel that the build doesn't need, so what is
// used of it is declared here; every attribute is read back when a plan is made, so a wrong number can't go unnoticed.
#include <dlfcn.h>

#include <array>
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "yaongi.h"

namespace {

using Handle = void*;
using Descriptor = void*;
using Layout = void*;
using Preference = void*;

struct Algorithm {
  uint64_t data[8];
};

struct Heuristic {
  Algorithm algorithm;
  size_t workspace_bytes;
  int status;
  float waves;
  int reserved[4];
};
static_assert(sizeof(Heuristic) == 96, "cublasLtMatmulHeuristicResult_t has 96 bytes");

enum ComputeType : int { COMPUTE_32F = 68 };
enum DataType : int { R_32F = 0, R_16BF = 14, R_8F_E4M3 = 28, R_8F_E5M2 = 29 };
enum DescriptorAttribute : int { TRANSA = 3, TRANSB = 4, A_SCALE_POINTER = 17, B_SCALE_POINTER = 18, FAST_ACCUM = 25 };
enum PreferenceAttribute : int { MAX_WORKSPACE_BYTES = 1, MIN_ALIGNMENT_A = 5, MIN_ALIGNMENT_D = 8 };
constexpr int32_t NOT_TRANSPOSED = 0, TRANSPOSED = 1;
constexpr uint32_t LARGEST_ALIGNMENT = 256;
constexpr size_t MOST_PLANS = 512;

// The functions, by their names without the prefix cublasLt.
struct Library {
  size_t (*GetVersion)();
  int (*Create)(Handle*);
  int (*MatmulDescCreate)(Descriptor*, int compute, int scale);
  int (*MatmulDescDestroy)(Descriptor);
  int (*MatmulDescSetAttribute)(Descriptor, int attribute, const void* value, size_t size);
  int (*MatmulDescGetAttribute)(Descriptor, int attribute, void* value, size_t size, size_t* written);
  int (*MatrixLayoutCreate)(Layout*, int type, uint64_t rows, uint64_t columns, int64_t leading);
  int (*MatrixLayoutDestroy)(Layout);
  int (*MatmulPreferenceCreate)(Preference*);
  int (*MatmulPreferenceDestroy)(Preference);
  int (*MatmulPreferenceSetAttribute)(Preference, int attribute, const void* value, size_t size);
  int (*MatmulPreferenceGetAttribute)(Preference, int attribute, void* value, size_t size, size_t* written);
  int (*MatmulAlgoGetHeuristic)(Handle, Descriptor, Layout a, Layout b, Layout c, Layout d, Preference, int wanted,
                                Heuristic*, int* found);
  int (*Matmul)(Handle, Descriptor, const void* alpha, const void* a, Layout, const void* b, Layout, const void* beta,
                const void* c, Layout, void* d, Layout, const Algorithm*, void* workspace, size_t bytes, cudaStream_t);
};

// The file that torch has loaded, of either major version; else one that the loader finds.
void* open_library() {
  for (const int flags : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW})
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"})
      if (void* file = dlopen(name, flags)) return file;
  return nullptr;
}

template <typename Function>
bool find(void* file, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(file, (std::string("cublasLt") + name).c_str()));
  return *function != nullptr;
}

// The library, looked for once; nullptr if there is none.
const Library* library() {
  static Library found;
  static const bool complete = [] {
    void* file = open_library();
#define FIND(name) find(file, #name, &found.name)
    return file && FIND(GetVersion) && FIND(Create) && FIND(MatmulDescCreate) && FIND(MatmulDescDestroy) &&
           FIND(MatmulDescSetAttribute) && FIND(MatmulDescGetAttribute) && FIND(MatrixLayoutCreate) &&
           FIND(MatrixLayoutDestroy) && FIND(MatmulPreferenceCreate) && FIND(MatmulPreferenceDestroy) &&
           FIND(MatmulPreferenceSetAttribute) && FIND(MatmulPreferenceGetAttribute) && FIND(MatmulAlgoGetHeuristic) &&
           FIND(Matmul);
#undef FIND
  }();
  return complete ? &found : nullptr;
}

void check(int status, const char* call) {
  if (status) throw std::runtime_error(std::string(call) + " returned cuBLAS status " + std::to_string(status));
}

#define CALL(name, ...) check(library()->name(__VA_ARGS__), "cublasLt" #name)

template <typename Object, typename Value>
void set(Object object, int attribute, Value value, int (*setter)(Object, int, const void*, size_t),
         int (*getter)(Object, int, void*, size_t, size_t*)) {
  Value back{};
  size_t written = 0;
  check(setter(object, attribute, &value, sizeof(Value)), "setting an attribute of cuBLASLt");
  check(getter(object, attribute, &back, sizeof(Value), &written), "reading an attribute of cuBLASLt");
  if (written != sizeof(Value) || back != value)
    throw std::runtime_error("attribute " + std::to_string(attribute) + " of cuBLASLt reads back as another value");
}

template <typename Value>
void set_descriptor(Descriptor descriptor, DescriptorAttribute attribute, Value value) {
  set(descriptor, attribute, value, library()->MatmulDescSetAttribute, library()->MatmulDescGetAttribute);
}

template <typename Value>
void set_preference(Preference preference, int attribute, Value value) {
  set(preference, attribute, value, library()->MatmulPreferenceSetAttribute, library()->MatmulPreferenceGetAttribute);
}

DataType data_type(YaongiType type) {
  switch (type) {
    case YaongiType::float32: return R_32F;
    case YaongiType::bfloat16: return R_16BF;
    case YaongiType::float8_e4m3fn: return R_8F_E4M3;
    case YaongiType::float8_e5m2: return R_8F_E5M2;
    default: throw std::runtime_error("a type that cuBLASLt doesn't take here");
  }
}

// A row-major matrix is, to cuBLASLt, its transpose by columns. A single row may have any stride.
int64_t leading(const YaongiMatrices& t) { return t.rows > 1 ? t.row_stride : t.columns; }

// The power of two, up to 256, that an address is a multiple of.
uint32_t alignment(const void* address) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(address) | LARGEST_ALIGNMENT;
  return static_cast<uint32_t>(bits & (~bits + 1));
}

// All that the choice of an algorithm depends on.
using Key = std::array<int64_t, 17>;

Key key_of(const YaongiMatmul& p, size_t workspace_bytes) {
  const YaongiMatrices& c = p.addend.data ? p.addend : p.out;
  return {p.device, p.a.rows, p.b.rows, p.a.columns, leading(p.a), leading(p.b), leading(c), leading(p.out),
          int64_t(p.a_type), int64_t(p.b_type), int64_t(p.out_type), p.exact, p.addend.data != nullptr,
          alignment(p.a.data) << 16 | alignment(p.b.data), alignment(c.data), alignment(p.out.data),
          int64_t(workspace_bytes)};
}

// One product's description and its algorithm: the heuristic's first choice.
class Plan {
 public:
  Plan(Handle handle, const YaongiMatmul& p, size_t workspace_bytes);
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  void run(Handle handle, const YaongiMatmul& p, void* workspace, size_t workspace_bytes, cudaStream_t stream) {
    const float one = 1.0f, beta = p.addend.data ? 1.0f : 0.0f;
    set_units(p);
    const void* c = p.addend.data ? p.addend.data : p.out.data;
    CALL(Matmul, handle, descriptor_, &one, p.b.data, a_, p.a.data, b_, &beta, c, c_, p.out.data, d_, &algorithm_,
         workspace, workspace_bytes, stream);
  }

 private:
  Plan() = default;
  // Out (M, N) by rows is (N, M) by columns: cuBLASLt's A is our b, transposed, and its B is our a.
  void set_units(const YaongiMatmul& p) {
    set_descriptor(descriptor_, A_SCALE_POINTER, p.unit_b);
    set_descriptor(descriptor_, B_SCALE_POINTER, p.unit_a);
  }
  void choose(Handle handle, const YaongiMatmul& p, size_t workspace_bytes);

  Descriptor descriptor_ = nullptr;
  Layout a_ = nullptr, b_ = nullptr, c_ = nullptr, d_ = nullptr;
  Preference preference_ = nullptr;
  Algorithm algorithm_ = {};
};

// Delegates, so that the destructor runs if a call fails.
Plan::Plan(Handle handle, const YaongiMatmul& p, size_t workspace_bytes) : Plan() {
  const uint64_t M = p.a.rows, N = p.b.rows, K = p.a.columns;
  const DataType out = data_type(p.out_type);
  CALL(MatmulDescCreate, &descriptor_, COMPUTE_32F, R_32F);
  set_descriptor(descriptor_, TRANSA, TRANSPOSED);
  set_descriptor(descriptor_, TRANSB, NOT_TRANSPOSED);
  set_descriptor(descriptor_, FAST_ACCUM, static_cast<int8_t>(!p.exact));
  set_units(p);
  CALL(MatrixLayoutCreate, &a_, data_type(p.b_type), K, N, leading(p.b));
  CALL(MatrixLayoutCreate, &b_, data_type(p.a_type), K, M, leading(p.a));
  CALL(MatrixLayoutCreate, &c_, out, N, M, leading(p.addend.data ? p.addend : p.out));
  CALL(MatrixLayoutCreate, &d_, out, N, M, leading(p.out));
  choose(handle, p, workspace_bytes);
}

void Plan::choose(Handle handle, const YaongiMatmul& p, size_t workspace_bytes) {
  const void* addresses[] = {p.b.data, p.a.data, p.addend.data ? p.addend.data : p.out.data, p.out.data};
  CALL(MatmulPreferenceCreate, &preference_);
  set_preference(preference_, MAX_WORKSPACE_BYTES, static_cast<uint64_t>(workspace_bytes));
  for (int i = 0; i <= MIN_ALIGNMENT_D - MIN_ALIGNMENT_A; ++i)
    set_preference(preference_, MIN_ALIGNMENT_A + i, alignment(addresses[i]));
  Heuristic choice = {};
  int found = 0;
  const auto ask = library()->MatmulAlgoGetHeuristic;
  const int status = ask(handle, descriptor_, a_, b_, c_, d_, preference_, 1, &choice, &found);
  if (status || !found || choice.status)
    throw std::runtime_error("cuBLASLt has no algorithm for M = " + std::to_string(p.a.rows) + ", N = " +
                             std::to_string(p.b.rows) + ", K = " + std::to_string(p.a.columns) + " (status " +
                             std::to_string(status ? status : choice.status) + ")");
  algorithm_ = choice.algorithm;
}

Plan::~Plan() {
  if (preference_) library()->MatmulPreferenceDestroy(preference_);
  for (const Layout layout : {a_, b_, c_, d_})
    if (layout) library()->MatrixLayoutDestroy(layout);
  if (descriptor_) library()->MatmulDescDestroy(descriptor_);
}

// One handle for each device, and the plans of all shapes seen; forgotten all together when they are too many.
struct State {
  std::mutex mutex;  // forward and backward passes run in different threads
  std::map<int, Handle> handles;
  std::map<Key, std::unique_ptr<Plan>> plans;
};

void multiply(const YaongiMatmul& p, void* workspace, size_t workspace_bytes, cudaStream_t stream) {
  static State& state = *new State;  // never destroyed: at exit the library may be gone before it
  const std::lock_guard<std::mutex> lock(state.mutex);
  Handle& handle = state.handles[p.device];
  if (!handle) CALL(Create, &handle);
  const Key key = key_of(p, workspace_bytes);
  auto place = state.plans.find(key);
  if (place == state.plans.end()) {
    auto plan = std::make_unique<Plan>(handle, p, workspace_bytes);
    if (state.plans.size() >= MOST_PLANS) state.plans.clear();
    place = state.plans.emplace(key, std::move(plan)).first;
  }
  place->second->run(handle, p, workspace, workspace_bytes, stream);
}

}  // namespace

int64_t yaongi_cublaslt_version() { return library() ? static_cast<int64_t>(library()->GetVersion()) : 0; }

const char* yaongi_matmul(const YaongiMatmul& problem, void* workspace, size_t workspace_bytes, cudaStream_t stream) {
  static thread_local std::string message;
  if (!library()) return "torch has no libcublasLt.so.13";
  try {
    multiply(problem, workspace, workspace_bytes, stream);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
