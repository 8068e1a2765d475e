// out = alpha·X·Yᵀ + beta·C for symmetric results: the lower triangle is computed, and mirrored as it is stored.
//
// A cluster of two blocks owns a 256 × 256 square of the result, and each block a tile of it, the upper or lower
// 128 × 256 half. Both blocks use the square's 256 rows of Y: each loads half of them and multicasts it to both. On the
// diagonal, with Y = X, a block's rows of X are among the rows of Y, and nothing else is loaded. In each block one
// warpgroup is the producer and two are consumers of 64 rows each. They use the widest wgmma, 64 × 256, which reads the
// least shared memory per FLOP; narrower ones are bound by shared memory. C is loaded while the products run. A tile is
// stored in panels of 64 × 64: below the diagonal as it is and transposed, on the diagonal with its lower triangle
// mirrored. Meanwhile the producer fills the next tile's stages.
#include "common/pipeline.cuh"
#include "common/ptx.cuh"
#include "common/tile.cuh"
#include "common/tma.h"
#include "yaongi.h"

namespace yaongi {
namespace {

constexpr int ROWS = 128, COLUMNS = 256;           // a block's tile
constexpr int CLUSTER = COLUMNS / ROWS;            // blocks per square
constexpr int BLOCK_K = PANEL_COLUMNS;             // columns of X and Y per stage
constexpr int STAGES = 4;
constexpr int CONSUMERS = 2, WARPGROUP = 128, WARPS = WARPGROUP / 32;
constexpr int THREADS = WARPGROUP * (1 + CONSUMERS);
constexpr int X_BYTES = ROWS * PANEL_ROW_BYTES, Y_BYTES = COLUMNS * PANEL_ROW_BYTES;
constexpr int STRIP = ROWS / CONSUMERS;            // rows per consumer
constexpr int STRIP_BYTES = STRIP * PANEL_ROW_BYTES;
constexpr int PANELS = COLUMNS / PANEL_COLUMNS;    // per strip, each 64 × 64
constexpr int PANEL_REGISTERS = 16;                // registers per thread and panel, each a pair of 16-bit elements

struct Stage {
  uint8_t x[X_BYTES];
  uint8_t y[Y_BYTES];
};

struct Shared {
  Stage stages[STAGES];
  uint8_t staging[CONSUMERS][2][STRIP_BYTES];  // panels being stored, two buffers per consumer
  RingBarriers<STAGES> ring;
};
constexpr int SHARED_BYTES = sizeof(Shared) + 1024;  // 1024 more bytes to align the panels

struct Problem {
  int rows;       // m
  int squares;    // squares on or below the diagonal of one matrix
  int total;      // squares of the whole batch
  int k_blocks;
  bool one_operand;  // Y is X
  float alpha, beta;
  const void* addend;  // C, or nullptr
  int64_t addend_row_stride, addend_batch_stride;
};

struct Tile {
  int batch, row, column;  // of the tile's first element
  bool shared_rows;        // the tile's rows of X are among the square's rows of Y
};

// Returns the tile of block `rank` in square `index`; squares are numbered row by row in a matrix's lower triangle.
__device__ __forceinline__ Tile tile_at(const Problem& p, int index, uint32_t rank) {
  const int batch = index / p.squares, t = index % p.squares;
  int row = static_cast<int>((sqrtf(8.0f * t + 1.0f) - 1.0f) * 0.5f);
  row += (row + 1) * (row + 2) / 2 <= t;  // correct a square root that is off by one
  row -= row * (row + 1) / 2 > t;
  const int column = t - row * (row + 1) / 2;
  return {batch, row * COLUMNS + static_cast<int>(rank) * ROWS, column * COLUMNS, p.one_operand && row == column};
}

__device__ __forceinline__ int cluster_index() { return blockIdx.x / CLUSTER; }
__device__ __forceinline__ int cluster_count() { return gridDim.x / CLUSTER; }

// Run by one thread: fills the ring with this block's rows of X, and with its half of the square's rows of Y, for both
// blocks.
__device__ void produce(Shared& s, const Problem& p, const CUtensorMap* map_x, const CUtensorMap* map_y) {
  constexpr uint16_t BOTH = 0b11;
  const uint32_t rank = ptx::cluster_rank();
  RingPosition<STAGES> at;
  for (int square = cluster_index(); square < p.total; square += cluster_count()) {
    const Tile tile = tile_at(p, square, rank);
    for (int k = 0; k < p.k_blocks; ++k, at.advance()) {
      Stage& stage = s.stages[at.stage];
      uint64_t* full = &s.ring.full[at.stage];
      ptx::barrier_wait(&s.ring.empty[at.stage], at.parity ^ 1);
      ptx::barrier_arrive_expect(full, tile.shared_rows ? Y_BYTES : X_BYTES + Y_BYTES);
      ptx::tma_load_3d_multicast(stage.y + rank * X_BYTES, map_y, full, BOTH, k * BLOCK_K, tile.column + rank * ROWS,
                                 tile.batch);
      if (!tile.shared_rows) ptx::tma_load_3d(stage.x, map_x, full, k * BLOCK_K, tile.row, tile.batch);
    }
  }
}

// Tells both blocks that this warp has read the stage, since both write into it.
__device__ __forceinline__ void release(Shared& s, uint32_t stage, uint32_t thread) {
  const uint32_t lane = thread % 32;
  if (lane < CLUSTER) ptx::barrier_arrive_at(&s.ring.empty[stage], lane);
}

// acc = a consumer's 64 rows of X · (256 rows of Y)ᵀ. A stage is released one step later, when the wgmma that read it
// have completed, so that one group of wgmma is always in flight.
template <bool BFLOAT16>
__device__ __forceinline__ void multiply(Shared& s, const Problem& p, const Tile& tile, int consumer, uint32_t thread,
                                         RingPosition<STAGES>& at, float (&acc)[128]) {
  const uint32_t rows = tile.shared_rows ? X_BYTES * (1 + ptx::cluster_rank()) : 0;  // Y follows X in a stage
  uint32_t previous = 0;
  for (int k = 0; k < p.k_blocks; ++k, at.advance()) {
    ptx::barrier_wait(&s.ring.full[at.stage], at.parity);
    const uint32_t base = ptx::shared_address(&s.stages[at.stage]);
    const uint64_t x = panel_descriptor(base + rows + consumer * STRIP_BYTES), y = panel_descriptor(base + X_BYTES);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < BLOCK_K / 16; ++step)
      ptx::wgmma_m64n256k16<BFLOAT16>(acc, x + 2 * step, y + 2 * step, k || step);
    ptx::wgmma_commit();
    if (k) {
      ptx::wgmma_wait<1>();
      release(s, previous, thread);
    }
    previous = at.stage;
  }
  ptx::wgmma_wait<0>();
  release(s, previous, thread);
}

// Loads a thread's elements of C for the strip that starts at `row`, in the order of its accumulators, for the panels on
// or below the diagonal only. Elements beyond the matrix get values from its edge; their results are not stored.
__device__ __forceinline__ void load_addend(const Problem& p, const Tile& tile, int row, uint32_t thread,
                                            uint32_t (&c)[PANELS * PANEL_REGISTERS]) {
  const int first_row = row + thread / 4 % 8 + thread / 32 * 16, first_column = tile.column + thread % 4 * 2;
  const uint16_t* start = static_cast<const uint16_t*>(p.addend) + tile.batch * p.addend_batch_stride;
#pragma unroll
  for (int panel = 0; panel < PANELS; ++panel) {
    if (tile.column + panel * PANEL_COLUMNS > row) continue;
#pragma unroll
    for (int i = 0; i < PANEL_REGISTERS; ++i) {
      const int r = min(first_row + i % 2 * 8, p.rows - 1);
      const int column = min(first_column + panel * PANEL_COLUMNS + i / 2 * 8, p.rows - 2);
      c[panel * PANEL_REGISTERS + i] = ptx::load_in_place(start + r * p.addend_row_stride + column);
    }
  }
}

// Returns an 8 × 8 matrix with its lower triangle mirrored to the upper one.
__device__ __forceinline__ uint32_t symmetric_8x8(uint32_t v, uint32_t lane) {
  const uint32_t row = lane / 4, column = lane % 4 * 2, mirrored = ptx::transpose_8x8(v);
  const uint32_t low = (row >= column ? v : mirrored) & 0xFFFF, high = (row > column ? v : mirrored) & 0xFFFF0000;
  return high | low;
}

enum class Panel { AS_IT_IS, TRANSPOSED, MIRRORED };  // MIRRORED: the lower triangle, mirrored

// Writes a panel to a staging buffer and from there to global memory, with its corner at (row, column). The previous
// store may still be reading the other buffer.
template <Panel PANEL>
__device__ __forceinline__ void store_panel(uint8_t* buffer, const CUtensorMap* map_out, int batch, int row, int column,
                                            uint32_t thread, uint32_t barrier, const uint32_t (&v)[PANEL_REGISTERS]) {
  const uint32_t warp = thread / 32, lane = thread % 32, matrix = lane / 8;  // lane: a row's address
  if (thread == 0) ptx::tma_store_wait_read<1>();
  ptx::named_barrier_sync(barrier, WARPGROUP);
#pragma unroll
  for (uint32_t pair = 0; pair < 4; ++pair) {  // pairs of columns of 8 × 8 matrices; a warp has two rows of them
    const uint32_t row_block = warp * 2 + matrix % 2, column_block = pair * 2 + matrix / 2;
    uint32_t four[4] = {v[pair * 4], v[pair * 4 + 1], v[pair * 4 + 2], v[pair * 4 + 3]};
    if constexpr (PANEL == Panel::MIRRORED) {
      if (pair > warp) continue;
      if (pair == warp) {
        four[0] = symmetric_8x8(four[0], lane);
        four[2] = ptx::transpose_8x8(four[1]);
        four[3] = symmetric_8x8(four[3], lane);
      }
    }
    const uint32_t here = ptx::shared_address(buffer) + swizzled_offset(row_block * 8 + lane % 8, column_block);
    const uint32_t there = ptx::shared_address(buffer) + swizzled_offset(column_block * 8 + lane % 8, row_block);
    if (PANEL != Panel::TRANSPOSED) ptx::stmatrix_x4(here, four);
    if (PANEL == Panel::TRANSPOSED || (PANEL == Panel::MIRRORED && pair < warp)) ptx::stmatrix_x4_transposed(there, four);
  }
  ptx::fence_async_proxy();
  ptx::named_barrier_sync(barrier, WARPGROUP);
  if (thread == 0) {
    constexpr bool TRANSPOSED = PANEL == Panel::TRANSPOSED;
    ptx::tma_store_3d(map_out, buffer, TRANSPOSED ? row : column, TRANSPOSED ? column : row, batch);
    ptx::tma_store_commit();
  }
}

// Epilogue of a consumer's strip: scales it, adds C, and stores it panel by panel. Panels below the diagonal are also
// stored transposed, panels on the diagonal are mirrored within themselves, and panels above it are not stored. `buffer`
// is the staging buffer that the previous store, maybe of the previous tile, does not read.
template <bool BFLOAT16>
__device__ __forceinline__ void finish(Shared& s, const Problem& p, const Tile& tile, int row, int consumer,
                                       uint32_t thread, const CUtensorMap* map_out, const float (&acc)[128],
                                       const uint32_t (&addend)[PANELS * PANEL_REGISTERS], int& buffer) {
  uint8_t(&staging)[2][STRIP_BYTES] = s.staging[consumer];
  const uint32_t barrier = 1 + consumer;
#pragma unroll
  for (int panel = 0; panel < PANELS; ++panel) {
    const int column = tile.column + panel * PANEL_COLUMNS;
    if (column > row || row >= p.rows) continue;
    uint32_t v[PANEL_REGISTERS];
#pragma unroll
    for (int i = 0; i < PANEL_REGISTERS; ++i) {
      const float2 c = p.addend ? unpack<BFLOAT16>(addend[panel * PANEL_REGISTERS + i]) : float2{0, 0};
      const float* d = &acc[panel * 32 + i * 2];
      v[i] = pack<BFLOAT16>(p.alpha * d[0] + p.beta * c.x, p.alpha * d[1] + p.beta * c.y);
    }
    if (column == row) {
      store_panel<Panel::MIRRORED>(staging[buffer], map_out, tile.batch, row, column, thread, barrier, v);
    } else {
      store_panel<Panel::AS_IT_IS>(staging[buffer], map_out, tile.batch, row, column, thread, barrier, v);
      buffer ^= 1;
      store_panel<Panel::TRANSPOSED>(staging[buffer], map_out, tile.batch, row, column, thread, barrier, v);
    }
    buffer ^= 1;
  }
}

template <bool BFLOAT16>
__device__ void consume(Shared& s, const Problem& p, int consumer, uint32_t thread, const CUtensorMap* map_out) {
  RingPosition<STAGES> at;
  int buffer = 0;
  for (int square = cluster_index(); square < p.total; square += cluster_count()) {
    const Tile tile = tile_at(p, square, ptx::cluster_rank());
    const int row = tile.row + consumer * STRIP;
    float acc[128];
    uint32_t addend[PANELS * PANEL_REGISTERS];
    if (p.addend) load_addend(p, tile, row, thread, addend);
    multiply<BFLOAT16>(s, p, tile, consumer, thread, at, acc);
    finish<BFLOAT16>(s, p, tile, row, consumer, thread, map_out, acc, addend, buffer);
  }
  if (thread == 0) ptx::tma_store_wait_read<0>();
}

template <bool BFLOAT16>
__global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    symmetric_product_kernel(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_y,
                             const __grid_constant__ CUtensorMap map_out, const Problem p) {
  extern __shared__ uint8_t raw[];
  Shared& s = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t(1023));
  const uint32_t warpgroup = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      ptx::barrier_init(&s.ring.full[i], 1);
      ptx::barrier_init(&s.ring.empty[i], CLUSTER * CONSUMERS * WARPS);
    }
    ptx::fence_barrier_init();
  }
  ptx::cluster_sync();
  ptx::wait_for_previous_kernel();  // the code above overlaps with the end of that kernel
  ptx::allow_next_kernel();
  if (warpgroup == 0) {
    ptx::decrease_registers<24>();
    if (thread == 0) produce(s, p, &map_x, &map_y);
  } else {
    ptx::increase_registers<240>();
    consume<BFLOAT16>(s, p, warpgroup - 1, thread, &map_out);
  }
  ptx::cluster_sync();  // no block may exit while the other still writes into it
}

// Prepares the kernel once per device, and finds how many of its clusters can be resident at a time.
template <bool BFLOAT16>
cudaError_t resident_clusters(int* clusters) {
  constexpr int DEVICES = 64;
  static int known[DEVICES] = {};
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (!known[device]) {
    const auto kernel = symmetric_product_kernel<BFLOAT16>;
    if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES))
      return error;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(CLUSTER);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = SHARED_BYTES;
    if (cudaError_t error = cudaOccupancyMaxActiveClusters(&known[device], kernel, &config)) return error;
  }
  *clusters = known[device];
  return cudaSuccess;
}

template <bool BFLOAT16>
const char* launch(const CUtensorMap& map_x, const CUtensorMap& map_y, const CUtensorMap& map_out, const Problem& p,
                   cudaStream_t stream) {
  int clusters = 0;
  if (cudaError_t error = resident_clusters<BFLOAT16>(&clusters)) return cudaGetErrorString(error);
  cudaLaunchAttribute early_start;
  early_start.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early_start.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(CLUSTER * (p.total < clusters ? p.total : clusters));
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = SHARED_BYTES;
  config.stream = stream;
  config.attrs = &early_start;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, symmetric_product_kernel<BFLOAT16>, map_x, map_y, map_out, p);
  return error ? cudaGetErrorString(error) : nullptr;
}

}  // namespace
}  // namespace yaongi

const char* yaongi_symmetric_product(YaongiType type, const YaongiMatrices& x, const YaongiMatrices& y,
                                     const YaongiMatrices& c, const YaongiMatrices& out, float alpha, float beta,
                                     cudaStream_t stream) {
  using namespace yaongi;
  CUtensorMap map_x, map_y, map_out;
  if (!make_tensor_map(&map_x, type, x, ROWS) || !make_tensor_map(&map_out, type, out, STRIP) ||
      (y.data && !make_tensor_map(&map_y, type, y, ROWS)))
    return "the driver refused a tensor map";
  const int squares = static_cast<int>((x.rows + COLUMNS - 1) / COLUMNS);
  Problem p;
  p.rows = static_cast<int>(x.rows);
  p.squares = squares * (squares + 1) / 2;
  p.total = static_cast<int>(x.batch) * p.squares;
  p.k_blocks = static_cast<int>((x.columns + BLOCK_K - 1) / BLOCK_K);
  p.one_operand = y.data == nullptr || (y.data == x.data && y.row_stride == x.row_stride && y.batch_stride == x.batch_stride);
  p.alpha = alpha;
  p.beta = beta;
  p.addend = c.data;
  p.addend_row_stride = c.row_stride;
  p.addend_batch_stride = c.batch_stride;
  const auto launch_type = type == YaongiType::bfloat16 ? launch<true> : launch<false>;
  return launch_type(map_x, y.data ? map_y : map_x, map_out, p, stream);
}
