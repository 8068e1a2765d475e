// dW[e] += Σ rows[k] ⊗ gathered[token[k]] over the rows k of expert e: the weight gradients of the experts, added to
// float32 sums in memory.
//
// One persistent block per multiprocessor walks over tiles of 128 × 256 or 256 × 128 of all experts' dW, and leaves out
// experts without rows. A producer warpgroup fills a ring of stages with 32 rows of both sides: the copy engine brings
// the sorted side, cp.async the gathered side. Both lie in shared memory as in the tensors, row by row, so the tensor
// cores read both transposed. Two consumer warpgroups hold half a tile each in registers.
//
// Where experts have few rows, reading and writing the sums takes longest. The copy engine then loads a tile's old sums
// under its products, the consumers add theirs in shared memory, and the copy engine stores the new sums under the next
// tile's products. Where experts have many rows, the copy engine adds a tile to memory by itself, in two halves: that is
// slower, but leaves shared memory for more stages. Each sum has one writer: the same bits in every run.
#include "common/pipeline.cuh"
#include "common/ptx.cuh"
#include "common/tile.cuh"
#include "common/tma.h"
#include "yaongi.h"

namespace yaongi {
namespace {

constexpr int ROWS = 32;                                // k's of a stage, one per lane of a warp
constexpr int CONSUMERS = 2, WARPGROUP = 128, WARPS = WARPGROUP / 32;
constexpr int THREADS = WARPGROUP * (1 + CONSUMERS);
constexpr int PANEL_BYTES = ROWS * PANEL_ROW_BYTES;     // 64 columns of a stage
constexpr int AHEAD = 4;                                // stages whose tokens are loaded at a time, a block ahead
constexpr int BOXES = 8, BOX_ROWS = 64, BOX_COLUMNS = 32;  // sums of a consumer, as they move: 128 bytes of each row
constexpr int BOX_SUMS = BOX_ROWS * BOX_COLUMNS;
constexpr int LOAD_AT = 8;                              // stages of a tile after which its old sums are loaded

// A tile is M × N of an expert's dW. WIDE: a consumer has 64 × 256 of it, else 128 × 128. REDUCE: the copy engine adds.
template <bool GATHER_LEFT, bool WIDE, bool REDUCE>
struct Shape {
  static constexpr int STAGES = REDUCE ? 6 : 4;
  static constexpr int UNTOLD = STAGES - 2;                  // stages whose gathered rows are still on their way
  static constexpr int STAGED = REDUCE ? BOXES / 2 : BOXES;  // boxes of a consumer in shared memory at a time
  static constexpr int M_PANELS = WIDE ? 2 : 4, N_PANELS = WIDE ? 4 : 2;
  static constexpr int GATHERED_PANELS = GATHER_LEFT ? M_PANELS : N_PANELS;
  static constexpr int SORTED_PANELS = GATHER_LEFT ? N_PANELS : M_PANELS;
  static constexpr int M = WIDE ? 64 : 128, N = N_PANELS * PANEL_COLUMNS;  // a consumer's share
  static constexpr int STRIPS = M / BOX_ROWS;                              // products of 64 × N
};

template <class S>
struct Stage {
  uint8_t m[S::M_PANELS][PANEL_BYTES];
  uint8_t n[S::N_PANELS][PANEL_BYTES];
};

template <class S>
struct Shared {
  float sums[CONSUMERS][S::STAGED][BOX_SUMS];
  Stage<S> stages[S::STAGES];
  RingBarriers<S::STAGES> ring;
  uint64_t old_sums[CONSUMERS];  // completes once a tile's old sums are in `sums`
};

struct Problem {
  const uint16_t* gathered;
  int64_t stride;     // of gathered, in elements
  const int* token;
  const int* offset;
  int sorted_width, gathered_width;
  int sorted_tiles, gathered_tiles;  // of one expert's dW
  int total;                         // tiles of all experts
};

struct Tile {
  int expert, sorted_column, gathered_column;
  int start, end;  // the expert's rows
};

template <class S>
__device__ __forceinline__ Tile tile_at(const Problem& p, int index) {
  const int tiles = p.sorted_tiles * p.gathered_tiles, expert = index / tiles, t = index % tiles;
  return {expert, t % p.sorted_tiles * S::SORTED_PANELS * PANEL_COLUMNS,
          t / p.sorted_tiles * S::GATHERED_PANELS * PANEL_COLUMNS,
          static_cast<int>(ptx::load_in_place(p.offset + expert)),
          static_cast<int>(ptx::load_in_place(p.offset + expert + 1))};
}

// The producer: 128 threads, which gather together; the first also commands the copy engine.
template <bool GATHER_LEFT, class S>
struct Producer {
  static constexpr int CHUNKS = S::GATHERED_PANELS * 8;      // of 16 bytes, in a gathered row of the tile
  static constexpr int COPIES = ROWS * CHUNKS / WARPGROUP;   // of a thread, for each stage
  static constexpr int ROW_STEP = WARPGROUP / CHUNKS;        // from a copy's row to the next one's

  Shared<S>& s;
  const Problem& p;
  const CUtensorMap* sorted;
  const uint32_t thread, lane = thread % 32;
  RingPosition<S::STAGES> at = {};
  int filled = 0;

  __device__ void run() {
    int ahead[AHEAD];
    Tile tile = tile_at<S>(p, blockIdx.x);
    load_tokens(ahead, tile.start, tile.end);
    for (int index = blockIdx.x; index < p.total; index += gridDim.x) {
      Tile next = {};
      if (index + gridDim.x < p.total) next = tile_at<S>(p, index + gridDim.x);
      if (tile.start >= tile.end) load_tokens(ahead, next.start, next.end);
      for (int block = tile.start; block < tile.end; block += AHEAD * ROWS) {
        int token[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) token[i] = ahead[i];
        const bool last = block + AHEAD * ROWS >= tile.end;
        load_tokens(ahead, last ? next.start : block + AHEAD * ROWS, last ? next.end : tile.end);
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
          if (block + i * ROWS < tile.end) fill(tile, block + i * ROWS, token[i]);
      }
      tile = next;
    }
    ptx::copies_wait<0>();
    ptx::fence_async_proxy();
    for (int i = min(filled, S::UNTOLD); i > 0; --i) tell(i);
  }

  // Lane i of each warp takes the i-th token of each of the next stages; −1 behind the expert's end.
  __device__ __forceinline__ void load_tokens(int (&token)[AHEAD], int begin, int end) {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int row = begin + i * ROWS + static_cast<int>(lane);
      token[i] = row < end ? static_cast<int>(ptx::load_in_place(p.token + row)) : -1;
    }
  }

  __device__ __forceinline__ void fill(const Tile& tile, int row, int token) {
    auto& stage = s.stages[at.stage];
    ptx::barrier_wait(&s.ring.empty[at.stage], at.parity ^ 1);
    if (thread == 0) {
      ptx::barrier_arrive_expect(&s.ring.full[at.stage], S::SORTED_PANELS * PANEL_BYTES);
#pragma unroll
      for (int i = 0; i < S::SORTED_PANELS; ++i)
        ptx::tma_load_3d(GATHER_LEFT ? stage.n[i] : stage.m[i], sorted, &s.ring.full[at.stage],
                         tile.sorted_column + i * PANEL_COLUMNS, row, 0);
    }
    __syncwarp();
    gather(GATHER_LEFT ? stage.m[0] : stage.n[0], tile.gathered_column, token);
    // The tensor cores read what cp.async wrote through another proxy: each thread waits for its own copies, and fences
    // them, before it arrives. It does so UNTOLD stages late, so that as many are on their way.
    ptx::copies_commit();
    if (filled >= S::UNTOLD) {
      ptx::copies_wait<S::UNTOLD>();
      ptx::fence_async_proxy();
      tell(S::UNTOLD);
    }
    ++filled;
    at.advance();
  }

  // Arrives for the stage `back` stages ago.
  __device__ __forceinline__ void tell(int back) {
    ptx::barrier_arrive(&s.ring.full[(at.stage + S::STAGES - back) % S::STAGES]);
  }

  // Copies 16-byte chunks of the rows whose tokens the lanes hold; zeros for token −1 and behind the last column.
  __device__ __forceinline__ void gather(uint8_t* panels, int first_column, int token) {
    const int chunk = thread % CHUNKS, column = first_column + chunk * 8;
    const bool inside = column < p.gathered_width;
    const uint16_t* source = p.gathered + (inside ? column : 0);
    const uint32_t panel = ptx::shared_address(panels + chunk / 8 * PANEL_BYTES);
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
      const int row = thread / CHUNKS + i * ROW_STEP;
      const int t = __shfl_sync(~0u, token, row);
      const uint16_t* from = source + (t < 0 ? 0 : t) * p.stride;
      ptx::copy_16_bytes(panel + swizzled_offset(row, chunk % 8), from, t >= 0 && inside);
    }
  }
};

// A consumer warpgroup: its share of each tile's products, and of the sums.
template <bool BFLOAT16, bool GATHER_LEFT, bool WIDE, bool REDUCE>
struct Consumer {
  using S = Shape<GATHER_LEFT, WIDE, REDUCE>;

  Shared<S>& s;
  const Problem& p;
  const CUtensorMap* out;
  const int consumer;
  const uint32_t thread, lane = thread % 32;
  RingPosition<S::STAGES> at = {};
  uint32_t old_sums_parity = 0;

  __device__ void run() {
    for (int index = blockIdx.x; index < p.total; index += gridDim.x) {
      const Tile tile = tile_at<S>(p, index);
      if (tile.start >= tile.end) continue;
      float products[S::STRIPS][S::N / 2];
      multiply(tile, products);
      add_and_store(tile, products);
    }
    if (thread == 0) ptx::tma_store_wait_read<0>();
  }

  __device__ __forceinline__ int first_row(const Tile& tile) const {
    return (GATHER_LEFT ? tile.gathered_column : tile.sorted_column) + consumer * S::M;
  }
  __device__ __forceinline__ int first_column(const Tile& tile) const {
    return GATHER_LEFT ? tile.sorted_column : tile.gathered_column;
  }

  __device__ __forceinline__ void multiply(const Tile& tile, float (&products)[S::STRIPS][S::N / 2]) {
    const int load_at = tile.start + LOAD_AT * ROWS;
    uint32_t previous = 0;
    for (int row = tile.start; row < tile.end; row += ROWS, at.advance()) {
      if (!REDUCE && row == load_at) load_old_sums(tile);
      ptx::barrier_wait(&s.ring.full[at.stage], at.parity);
      auto& stage = s.stages[at.stage];
      if (row + ROWS > tile.end) clear_behind(GATHER_LEFT ? stage.n[0] : stage.m[consumer * S::STRIPS], tile.end - row);
      ptx::wgmma_fence();
      const uint64_t m = transposed_descriptor<PANEL_BYTES>(ptx::shared_address(stage.m[consumer * S::STRIPS]));
      const uint64_t n = transposed_descriptor<PANEL_BYTES>(ptx::shared_address(stage.n[0]));
#pragma unroll
      for (int k = 0; k < ROWS / 16; ++k)
#pragma unroll
        for (int strip = 0; strip < S::STRIPS; ++strip) {
          constexpr uint64_t SIXTEEN_ROWS = 16 * PANEL_ROW_BYTES >> 4, PANEL = PANEL_BYTES >> 4;
          ptx::wgmma_transposed<BFLOAT16>(products[strip], m + strip * PANEL + k * SIXTEEN_ROWS, n + k * SIXTEEN_ROWS,
                                          row > tile.start || k);
        }
      ptx::wgmma_commit();
      if (row > tile.start) {
        ptx::wgmma_wait<1>();
        release(previous);
      }
      previous = at.stage;
    }
    if (!REDUCE && tile.end <= load_at) load_old_sums(tile);
    ptx::wgmma_wait<0>();
    release(previous);
  }

  __device__ __forceinline__ void release(uint32_t stage) {
    if (lane == 0) ptx::barrier_arrive(&s.ring.empty[stage]);
  }

  // Clears the sorted side from row `inside` on: the copy engine brought the next expert's rows, or rows that nobody
  // wrote and that may hold NaN. The gathered side is zero there. Both consumers may write the same zeros.
  __device__ __forceinline__ void clear_behind(uint8_t* panels, int inside) {
    constexpr int PANELS = GATHER_LEFT ? S::N_PANELS : S::STRIPS;
    for (int i = thread; i < (ROWS - inside) * 8; i += WARPGROUP)
#pragma unroll
      for (int panel = 0; panel < PANELS; ++panel)
        *reinterpret_cast<uint4*>(panels + panel * PANEL_BYTES + swizzled_offset(inside + i / 8, i % 8)) = uint4{};
    ptx::fence_async_proxy();
    sync();
  }

  __device__ __forceinline__ void sync() { ptx::named_barrier_sync(1 + consumer, WARPGROUP); }

  __device__ __forceinline__ void load_old_sums(const Tile& tile) {
    if (thread == 0) {
      ptx::tma_store_wait_read<0>();  // the last tile has left
      ptx::barrier_arrive_expect(&s.old_sums[consumer], S::STAGED * BOX_SUMS * sizeof(float));
#pragma unroll
      for (int box = 0; box < S::STAGED; ++box)
        ptx::tma_load_3d(s.sums[consumer][box], out, &s.old_sums[consumer], box_column(tile, box), box_row(tile, box),
                         tile.expert);
    }
    __syncwarp();
  }

  __device__ __forceinline__ int box_row(const Tile& tile, int box) const {
    return first_row(tile) + (WIDE ? 0 : box / 4 * BOX_ROWS);
  }
  __device__ __forceinline__ int box_column(const Tile& tile, int box) const {
    return first_column(tile) + (WIDE ? box : box % 4) * BOX_COLUMNS;
  }

  __device__ __forceinline__ void add_and_store(const Tile& tile, const float (&products)[S::STRIPS][S::N / 2]) {
    const int rows = GATHER_LEFT ? p.gathered_width : p.sorted_width;
    const int columns = GATHER_LEFT ? p.sorted_width : p.gathered_width;
#pragma unroll
    for (int first = 0; first < BOXES; first += S::STAGED) {
      if constexpr (REDUCE) {
        if (thread == 0) ptx::tma_store_wait_read<0>();
        sync();
      } else {
        ptx::barrier_wait(&s.old_sums[consumer], old_sums_parity);
        old_sums_parity ^= 1;
      }
#pragma unroll
      for (int box = 0; box < S::STAGED; ++box) fill_box(s.sums[consumer][box], &products[0][0] + (first + box) * 16);
      ptx::fence_async_proxy();
      sync();
      if (thread == 0) {
#pragma unroll
        for (int box = 0; box < S::STAGED; ++box) {
          const int row = box_row(tile, first + box), column = box_column(tile, first + box);
          if (row >= rows || column >= columns) continue;
          const auto move = REDUCE ? ptx::tma_add_3d : ptx::tma_store_3d;
          move(out, s.sums[consumer][box], column, row, tile.expert);
        }
        ptx::tma_store_commit();
      }
    }
  }

  // Stores a thread's products of a box, or adds them to what is there. It has two neighbouring columns in each of four
  // groups of 8, in two rows. In odd rows the groups come in another order, so that a warp meets no bank twice.
  __device__ __forceinline__ void fill_box(float* sums, const float* products) {
    const int first = thread / 32 * 16 + lane / 4;
    const bool odd = lane / 4 % 2;
    const auto place = [&](int i) {
      const int row = first + i % 2 * 8, column = (i / 2 % 2 + 2 * (i / 4 ^ odd)) * 8 + lane % 4 * 2;
      return reinterpret_cast<float2*>(sums + row * BOX_COLUMNS + (column ^ (row & 7) * 4));
    };
    float2 old[8];
    if constexpr (!REDUCE) {
#pragma unroll
      for (int i = 0; i < 8; ++i) old[i] = *place(i);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float *even_row = products + i * 2, *odd_row = products + (i ^ 4) * 2;
      float2 sum = {odd ? odd_row[0] : even_row[0], odd ? odd_row[1] : even_row[1]};
      if constexpr (!REDUCE) sum = {old[i].x + sum.x, old[i].y + sum.y};
      *place(i) = sum;
    }
  }
};

template <bool BFLOAT16, bool GATHER_LEFT, bool WIDE, bool REDUCE>
__global__ void __launch_bounds__(THREADS, 1)
    moe_weight_gradient_kernel(const __grid_constant__ CUtensorMap sorted, const __grid_constant__ CUtensorMap out,
                               const __grid_constant__ Problem p) {
  using S = Shape<GATHER_LEFT, WIDE, REDUCE>;
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& s = *reinterpret_cast<Shared<S>*>(raw);
  const uint32_t warpgroup = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::STAGES; ++i) {
      ptx::barrier_init(&s.ring.full[i], 1 + WARPGROUP);
      ptx::barrier_init(&s.ring.empty[i], CONSUMERS * WARPS);
    }
    for (uint64_t& barrier : s.old_sums) ptx::barrier_init(&barrier, 1);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (warpgroup == 0) {
    ptx::decrease_registers<56>();
    Producer<GATHER_LEFT, S>{s, p, &sorted, thread}.run();
  } else {
    ptx::increase_registers<224>();
    Consumer<BFLOAT16, GATHER_LEFT, WIDE, REDUCE>{s, p, &out, static_cast<int>(warpgroup) - 1, thread}.run();
  }
}

template <bool BFLOAT16, bool GATHER_LEFT, bool WIDE, bool REDUCE>
const char* launch(const YaongiWeightGradient& g, cudaStream_t stream) {
  using S = Shape<GATHER_LEFT, WIDE, REDUCE>;
  constexpr int BYTES = sizeof(Shared<S>);
  CUtensorMap sorted, out;
  if (!make_tensor_map(&sorted, g.type, g.rows, ROWS) || !make_tensor_map(&out, YaongiType::float32, g.out, BOX_ROWS))
    return "the driver refused a tensor map";
  const auto tiles = [](int64_t width, int panels) {
    return static_cast<int>((width + panels * PANEL_COLUMNS - 1) / (panels * PANEL_COLUMNS));
  };
  Problem p;
  p.gathered = static_cast<const uint16_t*>(g.gathered.data);
  p.stride = g.gathered.row_stride;
  p.token = g.token;
  p.offset = g.offset;
  p.sorted_width = static_cast<int>(g.rows.columns);
  p.gathered_width = static_cast<int>(g.gathered.columns);
  p.sorted_tiles = tiles(g.rows.columns, S::SORTED_PANELS);
  p.gathered_tiles = tiles(g.gathered.columns, S::GATHERED_PANELS);
  p.total = static_cast<int>(g.out.batch) * p.sorted_tiles * p.gathered_tiles;
  int device = 0, processors = 0;
  const auto kernel = moe_weight_gradient_kernel<BFLOAT16, GATHER_LEFT, WIDE, REDUCE>;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (!error) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
  if (error) return cudaGetErrorString(error);
  kernel<<<p.total < processors ? p.total : processors, THREADS, BYTES, stream>>>(sorted, out, p);
  error = cudaGetLastError();
  return error ? cudaGetErrorString(error) : nullptr;
}

template <bool... CHOSEN>
const char* choose(const YaongiWeightGradient& g, cudaStream_t stream) {
  if constexpr (sizeof...(CHOSEN) == 4) {
    return launch<CHOSEN...>(g, stream);
  } else {
    const bool options[] = {g.type == YaongiType::bfloat16, g.gather_left, g.wide, g.reduce};
    return options[sizeof...(CHOSEN)] ? choose<CHOSEN..., true>(g, stream) : choose<CHOSEN..., false>(g, stream);
  }
}

}  // namespace
}  // namespace yaongi

const char* yaongi_moe_weight_gradient(const YaongiWeightGradient& gradient, cudaStream_t stream) {
  return yaongi::choose<>(gradient, stream);
}
