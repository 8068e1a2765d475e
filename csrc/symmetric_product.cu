// out = alpha·X·Yᵀ + beta·C for symmetric results: the lower triangle is computed, and mirrored as it is stored.
//
// A cluster of 2 × 2 blocks owns a 256 × 256 square, a block one 128 × 128 tile of it. Rows of X are shared by the two
// blocks of a row, rows of Y by the two of a column: each block loads half of either and multicasts it, which halves the
// traffic from L2 (without it, 128 × 128 tiles are bound by L2). On the diagonal, with Y = X, the two sets of rows are
// the same: each block loads a quarter and multicasts it to all, which halves the traffic again. In a block one warpgroup produces and two consume in
// turns, a tile each, so that one's epilogue runs under the other's products. They share one ring: the stages of one's
// tile follow those of the other's, and `turn` keeps each from waiting on a stage's phase before its time. Tiles above
// the diagonal, and outside the matrix, only keep the ring turning.
#include "common/pipeline.cuh"
#include "common/ptx.cuh"
#include "common/tile.cuh"
#include "common/tma.h"
#include "yaongi.h"

namespace yaongi {
namespace {

constexpr int TILE = 128;                 // rows and columns of a block's tile
constexpr int BLOCK_K = PANEL_COLUMNS;    // columns of X and Y a stage holds
constexpr int STAGES = 5;
constexpr int CLUSTER = 4;
constexpr int CONSUMERS = 2;              // warpgroups
constexpr int WARPGROUP = 128;
constexpr int THREADS = WARPGROUP * (1 + CONSUMERS);
constexpr int OPERAND_BYTES = TILE * PANEL_ROW_BYTES;   // 16 KiB
constexpr int STAGE_BYTES = 2 * OPERAND_BYTES;
constexpr int STAGING_BYTES = 2 * OPERAND_BYTES;        // a tile on its way out: two panels
struct Shared {
  uint8_t stages[STAGES][STAGE_BYTES];
  uint8_t staging[CONSUMERS][STAGING_BYTES];
  RingBarriers<STAGES> ring;
  uint64_t addend_full[CONSUMERS];
  uint64_t turn[CONSUMERS];  // whose products run: a consumer hands over when all of its own are issued
};
constexpr int SHARED_BYTES = sizeof(Shared) + 1024;     // 1024: to align the panels

struct Problem {
  int blocks;        // tiles a side of one matrix
  int squares;       // 256 × 256 squares on or below the diagonal of one matrix
  int total;         // squares of the whole batch
  int k_blocks;
  float alpha, beta;
  bool has_addend;
  bool one_operand;  // Y is X
};

struct Tile {
  int batch, row, column;  // row and column count tiles
  bool shared_rows;        // the square's rows of X are also its rows of Y
  bool wanted;             // on or below the diagonal, and within the matrix
};

// The tile of block `rank` in square `index`: squares run row by row through a matrix's lower triangle.
__device__ __forceinline__ Tile tile_at(const Problem& p, int index, uint32_t rank) {
  const int batch = index / p.squares, t = index % p.squares;
  int row = static_cast<int>((sqrtf(8.0f * t + 1.0f) - 1.0f) * 0.5f);
  row += (row + 1) * (row + 2) / 2 <= t;  // the square root may be off by one
  row -= row * (row + 1) / 2 > t;
  const int column = t - row * (row + 1) / 2;
  Tile tile = {batch, 2 * row + static_cast<int>(rank >> 1), 2 * column + static_cast<int>(rank & 1)};
  tile.shared_rows = p.one_operand && row == column;
  tile.wanted = tile.row >= tile.column && tile.row < p.blocks;
  return tile;
}

__device__ __forceinline__ int cluster_index() { return blockIdx.x / CLUSTER; }
__device__ __forceinline__ int cluster_count() { return gridDim.x / CLUSTER; }

// One thread: fills the ring with this block's share of X and Y, for each tile of the cluster in turn. A stage holds the
// tile's 128 rows of X, then its 128 of Y; or on the diagonal the square's 256 rows.
__device__ void produce(Shared& s, const Problem& p, const CUtensorMap* map_x, const CUtensorMap* map_y) {
  constexpr int SHARE = TILE / 2, SHARE_BYTES = OPERAND_BYTES / 2;
  const uint32_t rank = ptx::cluster_rank();
  const int low = rank & 1, high = rank >> 1;
  const uint16_t row_mask = 0b11 << (2 * high), column_mask = 0b101 << low, all_mask = 0b1111;
  RingPosition<STAGES> at;
  for (int square = cluster_index(); square < p.total; square += cluster_count()) {
    const Tile tile = tile_at(p, square, rank);
    for (int k = 0; k < p.k_blocks; ++k, at.advance()) {
      uint64_t* full = &s.ring.full[at.stage];
      uint8_t* stage = s.stages[at.stage];
      ptx::barrier_wait(&s.ring.empty[at.stage], at.parity ^ 1);
      ptx::barrier_arrive_expect(full, STAGE_BYTES);
      if (tile.shared_rows) {
        ptx::tma_load_3d_multicast(stage + rank * SHARE_BYTES, map_x, full, all_mask, k * BLOCK_K,
                                   tile.row * TILE + low * SHARE, tile.batch);
      } else {
        ptx::tma_load_3d_multicast(stage + low * SHARE_BYTES, map_x, full, row_mask, k * BLOCK_K,
                                   tile.row * TILE + low * SHARE, tile.batch);
        ptx::tma_load_3d_multicast(stage + OPERAND_BYTES + high * SHARE_BYTES, map_y, full, column_mask, k * BLOCK_K,
                                   tile.column * TILE + high * SHARE, tile.batch);
      }
    }
  }
}

// One consumer's place: its turns, and its position in the ring that it shares with the other.
struct Consumer {
  int index;
  uint32_t rank, thread;
  RingPosition<STAGES> at;
  uint32_t turn_parity;

  __device__ __forceinline__ void take_turn(Shared& s) {
    ptx::barrier_wait(&s.turn[index], turn_parity);
    turn_parity ^= 1;
  }
  __device__ __forceinline__ void hand_over(Shared& s) const {
    if (thread % 32 == 0) ptx::barrier_arrive(&s.turn[index ^ 1]);
  }
};

// Tells all blocks, any of which may write into this stage, that this warp has read it.
__device__ __forceinline__ void release(Shared& s, uint32_t stage, const Consumer& me) {
  const uint32_t lane = me.thread % 32;
  if (lane < CLUSTER) ptx::barrier_arrive_at(&s.ring.empty[stage], lane);
}

// acc = X tile · (Y tile)ᵀ: rows 0..63 in acc[0], 64..127 in acc[1]. A stage is released one step late, when the
// products that read it are surely done.
template <bool BFLOAT16>
__device__ __forceinline__ void multiply(Shared& s, const Problem& p, const Tile& tile, Consumer& me,
                                         float (&acc)[2][64]) {
  const uint32_t x_offset = tile.shared_rows ? (me.rank >> 1) * OPERAND_BYTES : 0;
  const uint32_t y_offset = tile.shared_rows ? (me.rank & 1) * OPERAND_BYTES : OPERAND_BYTES;
  uint32_t previous = 0;
  for (int k = 0; k < p.k_blocks; ++k, me.at.advance()) {
    ptx::barrier_wait(&s.ring.full[me.at.stage], me.at.parity);
    const uint32_t base = ptx::shared_address(s.stages[me.at.stage]);
    const uint64_t x_top = panel_descriptor(base + x_offset), y = panel_descriptor(base + y_offset);
    const uint64_t x_bottom = panel_descriptor(base + x_offset + OPERAND_BYTES / 2);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < BLOCK_K / 16; ++step) {
      ptx::wgmma_m64n128k16<BFLOAT16>(acc[0], x_top + 2 * step, y + 2 * step, k || step);
      ptx::wgmma_m64n128k16<BFLOAT16>(acc[1], x_bottom + 2 * step, y + 2 * step, k || step);
    }
    ptx::wgmma_commit();
    if (k) {
      ptx::wgmma_wait<1>();
      release(s, previous, me);
    }
    previous = me.at.stage;
  }
  me.hand_over(s);
  ptx::wgmma_wait<0>();
  release(s, previous, me);
}

__device__ __forceinline__ void keep_turning(Shared& s, const Problem& p, Consumer& me) {
  for (int k = 0; k < p.k_blocks; ++k, me.at.advance()) {
    ptx::barrier_wait(&s.ring.full[me.at.stage], me.at.parity);
    release(s, me.at.stage, me);
  }
  me.hand_over(s);
}

// Where a lane's row of the four 8 × 8 matrices at (row block 16·warp + 64·half, columns 16·pair) lies in the staging
// tile; `transposed` swaps the roles of rows and columns.
__device__ __forceinline__ uint32_t fragment_address(uint32_t staging, uint32_t thread, int half, int pair,
                                                     bool transposed) {
  const uint32_t warp = thread / 32, lane = thread % 32, matrix = lane / 8;
  const uint32_t row_block = half * 8 + warp * 2 + (matrix & 1), column_block = pair * 2 + (matrix >> 1);  // of 8
  const uint32_t row = (transposed ? column_block : row_block) * 8 + lane % 8;
  const uint32_t chunk = transposed ? row_block : column_block;
  return staging + chunk / 8 * OPERAND_BYTES + swizzled_offset(row, chunk % 8);
}

// acc = alpha·acc + beta·C, with C's tile in the staging buffer.
template <bool BFLOAT16>
__device__ __forceinline__ void scale_and_add(const Problem& p, uint32_t staging, uint32_t thread,
                                              float (&acc)[2][64]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int pair = 0; pair < 8; ++pair) {
      uint32_t addend[4];
      ptx::ldmatrix_x4(addend, fragment_address(staging, thread, half, pair, false));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 c = unpack<BFLOAT16>(addend[i]);
        float* d = &acc[half][pair * 8 + i * 2];
        d[0] = p.alpha * d[0] + p.beta * c.x;
        d[1] = p.alpha * d[1] + p.beta * c.y;
      }
    }
  }
}

__device__ __forceinline__ void scale(const Problem& p, float (&acc)[2][64]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    acc[0][i] *= p.alpha;
    acc[1][i] *= p.alpha;
  }
}

// Writes the tile, or its transpose, to the staging buffer and from there to memory.
template <bool BFLOAT16, bool TRANSPOSED>
__device__ __forceinline__ void store(uint8_t* staging, const CUtensorMap* map_out, const Tile& tile, uint32_t thread,
                                      uint32_t barrier_id, const float (&acc)[2][64]) {
  if (thread == 0) ptx::tma_store_wait_read();
  ptx::named_barrier_sync(barrier_id, WARPGROUP);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int pair = 0; pair < 8; ++pair) {
      uint32_t v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = pack<BFLOAT16>(acc[half][pair * 8 + i * 2], acc[half][pair * 8 + i * 2 + 1]);
      const uint32_t address = fragment_address(ptx::shared_address(staging), thread, half, pair, TRANSPOSED);
      if constexpr (TRANSPOSED) {
        ptx::stmatrix_x4_transposed(address, v);
      } else {
        ptx::stmatrix_x4(address, v);
      }
    }
  }
  ptx::fence_async_proxy();
  ptx::named_barrier_sync(barrier_id, WARPGROUP);
  if (thread == 0) {
    const int row = TRANSPOSED ? tile.column : tile.row, column = TRANSPOSED ? tile.row : tile.column;
    for (int panel = 0; panel < 2; ++panel)
      ptx::tma_store_3d(map_out, staging + panel * OPERAND_BYTES, column * TILE + panel * PANEL_COLUMNS, row * TILE,
                        tile.batch);
    ptx::tma_store_commit();
  }
}

// One thread: brings C's tile into the staging buffer, once the last tile has left it.
__device__ __forceinline__ void load_addend(uint8_t* staging, const CUtensorMap* map_c, uint64_t* full,
                                            const Tile& tile) {
  ptx::tma_store_wait_read();
  ptx::barrier_arrive_expect(full, STAGING_BYTES);
  for (int panel = 0; panel < 2; ++panel)
    ptx::tma_load_3d(staging + panel * OPERAND_BYTES, map_c, full, tile.column * TILE + panel * PANEL_COLUMNS,
                     tile.row * TILE, tile.batch);
}

// One warpgroup: every second tile of the block, its product, and its two copies out.
template <bool BFLOAT16>
__device__ void consume(Shared& s, const Problem& p, int index, uint32_t thread, const CUtensorMap* map_c,
                        const CUtensorMap* map_out) {
  const uint32_t barrier_id = 1 + index;
  uint8_t* staging = s.staging[index];
  Consumer me = {index, ptx::cluster_rank(), thread, {}, index == 0};  // the first turn of the first comes at once
  me.at.advance(index * p.k_blocks);
  uint32_t addend_parity = 0;
  for (int square = cluster_index() + index * cluster_count(); square < p.total;
       square += CONSUMERS * cluster_count(), me.at.advance(p.k_blocks)) {
    const Tile tile = tile_at(p, square, me.rank);
    me.take_turn(s);
    if (!tile.wanted) {
      keep_turning(s, p, me);
      continue;
    }
    if (p.has_addend && thread == 0) load_addend(staging, map_c, &s.addend_full[index], tile);
    float acc[2][64];
    multiply<BFLOAT16>(s, p, tile, me, acc);
    if (p.has_addend) {
      ptx::barrier_wait(&s.addend_full[index], addend_parity);
      addend_parity ^= 1;
      scale_and_add<BFLOAT16>(p, ptx::shared_address(staging), thread, acc);
    } else {
      scale(p, acc);
    }
    store<BFLOAT16, false>(staging, map_out, tile, thread, barrier_id, acc);
    if (tile.row != tile.column) store<BFLOAT16, true>(staging, map_out, tile, thread, barrier_id, acc);
  }
  if (thread == 0) ptx::tma_store_wait_read();
}

template <bool BFLOAT16>
__global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    symmetric_product_kernel(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_y,
                             const __grid_constant__ CUtensorMap map_c, const __grid_constant__ CUtensorMap map_out,
                             const Problem p) {
  extern __shared__ uint8_t raw[];
  Shared& s = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t(1023));
  const uint32_t warpgroup = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      ptx::barrier_init(&s.ring.full[i], 1);
      ptx::barrier_init(&s.ring.empty[i], CLUSTER * WARPGROUP / 32);
    }
    for (int i = 0; i < CONSUMERS; ++i) {
      ptx::barrier_init(&s.addend_full[i], 1);
      ptx::barrier_init(&s.turn[i], WARPGROUP / 32);
    }
    ptx::fence_barrier_init();
  }
  ptx::cluster_sync();
  if (warpgroup == 0) {
    ptx::decrease_registers<40>();
    if (thread == 0) produce(s, p, &map_x, &map_y);
  } else {
    ptx::increase_registers<232>();
    consume<BFLOAT16>(s, p, warpgroup - 1, thread, &map_c, &map_out);
  }
  ptx::cluster_sync();  // no block may leave while another still writes into it
}

// Prepares the kernel once a device, and finds how many of its clusters fit at a time.
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
const char* launch(const CUtensorMap& map_x, const CUtensorMap& map_y, const CUtensorMap& map_c,
                   const CUtensorMap& map_out, const Problem& p, cudaStream_t stream) {
  int clusters = 0;
  if (cudaError_t error = resident_clusters<BFLOAT16>(&clusters)) return cudaGetErrorString(error);
  const int grid = CLUSTER * (p.total < clusters ? p.total : clusters);
  symmetric_product_kernel<BFLOAT16><<<grid, THREADS, SHARED_BYTES, stream>>>(map_x, map_y, map_c, map_out, p);
  const cudaError_t error = cudaGetLastError();
  return error ? cudaGetErrorString(error) : nullptr;
}

}  // namespace
}  // namespace yaongi

const char* yaongi_symmetric_product(YaongiType type, const YaongiMatrices& x, const YaongiMatrices& y,
                                     const YaongiMatrices& c, const YaongiMatrices& out, float alpha, float beta,
                                     cudaStream_t stream) {
  using namespace yaongi;
  CUtensorMap map_x, map_y, map_c, map_out;
  if (!make_tensor_map(&map_x, type, x, TILE / 2) || !make_tensor_map(&map_out, type, out, TILE) ||
      (y.data && !make_tensor_map(&map_y, type, y, TILE / 2)) || (c.data && !make_tensor_map(&map_c, type, c, TILE)))
    return "the driver refused a tensor map";
  if (!y.data) map_y = map_x;
  if (!c.data) map_c = map_out;
  const int blocks = static_cast<int>((x.rows + TILE - 1) / TILE), squares = (blocks + 1) / 2;
  Problem p;
  p.blocks = blocks;
  p.squares = squares * (squares + 1) / 2;
  p.total = static_cast<int>(x.batch) * p.squares;
  p.k_blocks = static_cast<int>((x.columns + BLOCK_K - 1) / BLOCK_K);
  p.alpha = alpha;
  p.beta = beta;
  p.has_addend = c.data != nullptr;
  p.one_operand = y.data == nullptr;
  const auto launch_type = type == YaongiType::bfloat16 ? launch<true> : launch<false>;
  return launch_type(map_x, map_y, map_c, map_out, p, stream);
}
