// What the sides of the scan's reverse walk share: sizes, shared memory, a thread's part of a tile, g in 24 bits.
#pragma once

#include "common/pipeline.cuh"
#include "common/products.cuh"
#include "common/ptx.cuh"
#include "common/tile.cuh"
#include "yaongi.h"

namespace yaongi {
namespace {

constexpr int Q = 64, P = 64, N = 128;  // tokens of a chunk, a head's dimension, the state's
constexpr int HEADS = 4;                // of a part
constexpr int WARPGROUP = 128, WARPS = 4, SIDES = 3, THREADS = WARPGROUP * (1 + SIDES);
constexpr int PANEL_BYTES = 64 * PANEL_ROW_BYTES, STATE_BYTES = N * PANEL_ROW_BYTES, LOW_BYTES = N * P;
constexpr int PLANES = 4;  // of the steps
constexpr int STAGES = 2;  // of a step's operands
constexpr int SLOTS = 2;   // of the sums that one part passes to the next
constexpr uint64_t SIXTEEN_ROWS = 16 * PANEL_ROW_BYTES >> 4, SIXTEEN_COLUMNS = 2;  // steps of descriptors

struct Stage {  // a step's operands; dx takes x's place
  uint8_t x[PANEL_BYTES], dy[PANEL_BYTES];
  uint8_t h[STATE_BYTES];  // (N, P)
  float steps[PLANES][Q];  // S, its rounding error s, s − log2 δ, o·δ
};

struct Carried {  // g of a head
  uint8_t high[STATE_BYTES];                         // (N, P)
  uint4 low[LOW_BYTES / 16 / WARPGROUP][WARPGROUP];  // a byte for each element of `high`, each thread's own
};

struct Sums {  // of a step, for each token
  float4 inputs[Q];      // x·du·δ, da_k's terms for tokens ≥ k, those for tokens < k, dy·x
  float outputs[Q];      // more terms for tokens ≥ k
  float passing[WARPS];  // and those of the last token
};

struct Place {
  int batch, group, segment, part;
  int head;          // the part's first
  int first, count;  // first chunk, number of chunks

  // First token of the chunk that the walk reaches after `turn` others.
  __device__ __forceinline__ int token(int turn) const { return (first + count - 1 - turn) * Q; }
};

struct Shared {
  Stage stages[STAGES];
  Carried carried[HEADS];
  uint8_t b[2][PANEL_BYTES], c[2][PANEL_BYTES];
  uint8_t mix[PANEL_BYTES], edy[PANEL_BYTES];  // E∘S, or dS after a chunk's last head; e·dy
  float2 scores[10][4][32];  // S up to the diagonal's blocks, each thread's own: no registers are left for it
  Sums sums[STAGES];
  float own[2][Q];  // S's diagonal, by the chunk's parity
  RingBarriers<STAGES> ring;
  uint64_t done[STAGES];  // the sides have finished a step
  uint64_t edy_written, edy_read, mix_written, mix_read;
  uint64_t g_read[HEADS], g_written[HEADS];  // by the inputs' products; the next g, by the side of the state
  uint64_t chunk_full, chunk_empty;
  uint64_t sent[SLOTS];      // this part's sums are on their way to the next
  uint64_t received[SLOTS];  // those of the part before are there
  uint64_t vacated[SLOTS];   // the next part has read this part's
  Place place;  // here, since registers are few
};
static_assert(sizeof(Shared) <= 232448, "shared memory");

// A head of a chunk, in the order of the walk.
struct Step {
  int turn = 0, head = 0;

  __device__ __forceinline__ void advance() {
    if (++head == HEADS) {
      head = 0;
      ++turn;
    }
  }
  // Its place in the ring of operands; a chunk is two rounds.
  __device__ __forceinline__ int stage() const { return head % STAGES; }
  __device__ __forceinline__ int parity() const { return head / STAGES & 1; }
  // Of what the outputs' side makes: e·dy of each head; E∘S too, and, as head HEADS, a chunk's dS.
  __device__ __forceinline__ int edy_parity() const { return head & 1; }
  __device__ __forceinline__ int mix_parity() const { return (turn * (HEADS + 1) + head) & 1; }
};
static_assert(HEADS == 2 * STAGES);

struct Problem {
  const float *steps, *D;
  const float* entry;  // (segments, B, H, P, N): the gradient of the state at each segment's end, or nullptr for zeros
  float* first;        // (B, H, P, N): the gradient of the row's first state, or nullptr
  float4* passed;      // (blocks, SLOTS, 2, 16, WARPGROUP): sums that a block gets from the part before
  float* sums;         // (B, H, padded, 4)
  int* flags;          // (blocks): set where a result is not finite; or nullptr
  int groups, parts, segments, chunks, chunks_per_segment, padded;

  // Row of (B, H).
  __device__ __forceinline__ int64_t row(const Place& w, int head) const {
    return int64_t(w.batch) * groups * parts * HEADS + w.head + head;
  }
};

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint64_t rows_descriptor(const uint8_t* panel) {
  return transposed_descriptor<PANEL_BYTES>(ptx::shared_address(panel));
}
__device__ __forceinline__ uint64_t columns_descriptor(const uint8_t* panel) {
  return panel_descriptor(ptx::shared_address(panel));
}

// Two bfloat16 as floats; unpack<true> takes twice as many instructions.
__device__ __forceinline__ float2 halves(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)};
}
__device__ __forceinline__ uint32_t scaled(uint32_t pair, float weight) {
  const float2 v = halves(pair);
  return pack<true>(v.x * weight, v.y * weight);
}
__device__ __forceinline__ void add_product(float& sum, float2 a, float2 b) {
  sum = fmaf(a.x, b.x, fmaf(a.y, b.y, sum));
}
__device__ __forceinline__ float sum_of_four(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

// Sets a block's flag if a sum is NaN or infinite: 0 · v is NaN then.
template <int COUNT>
__device__ __forceinline__ void flag_broken(const Problem& p, const float (&v)[COUNT]) {
  float zero = 0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) zero = fmaf(v[i], 0.f, zero);
  if (zero != 0) p.flags[blockIdx.x] = 1;
}

// g is carried in 24 bits: the upper 16 are a bfloat16, rounded to nearest, and the operand of products; the other 8 say
// how far it is from g. They are the upper bits of g's, with this added; to join them, the last 8 are read twice.
constexpr uint32_t CARRY_OFFSET = 0x8080;

__device__ __forceinline__ uint32_t carry_bits(float g) {
  return min(__float_as_int(g), 0x7FC00000) + static_cast<int>(CARRY_OFFSET);  // NaN stays NaN
}
// Splits four numbers; `low` gets their lower bytes.
__device__ __forceinline__ void split(const float* g, uint32_t& high0, uint32_t& high1, uint32_t& low) {
  const uint32_t a = carry_bits(g[0]), b = carry_bits(g[1]), c = carry_bits(g[2]), d = carry_bits(g[3]);
  high0 = __byte_perm(a, b, 0x7632);
  high1 = __byte_perm(c, d, 0x7632);
  low = __byte_perm(__byte_perm(a, b, 0x0051), __byte_perm(c, d, 0x0051), 0x5410);
}
// Joins number I of four.
template <int I>
__device__ __forceinline__ float joined(uint32_t high, uint32_t low) {
  return __uint_as_float(__byte_perm(high, low, (I % 2 ? 0x3200 : 0x1000) | (4 + I) * 0x11) - CARRY_OFFSET);
}

// A thread of a side, and its part of a 64 × 64 tile: rows `row` and `row` + 8, two neighbouring columns in each group of
// 8. Pair i of a tile lies in row + i % 2 · 8 and column i / 2 · 8 + `column`.
struct Thread {
  uint32_t thread, warp, lane, offset;
  int row, column;

  __device__ __forceinline__ explicit Thread(uint32_t index)
      : thread(index % WARPGROUP),
        warp(thread / 32),
        lane(thread % 32),
        offset(swizzled_offset(warp * 16 + lane % 16, lane / 16)),
        row(warp * 16 + lane / 4),
        column(lane % 4 * 2) {}

  // Read anew: what lives through a loop would be spilled.
  static __device__ __forceinline__ Thread anew() {
    uint32_t index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return Thread(index);
  }

  // Pairs 4k to 4k + 3, columns 16k to 16k + 15: also the left factor of a product over these columns.
  __device__ __forceinline__ uint32_t place(const uint8_t* panel, int k) const {
    return (ptx::shared_address(panel) + offset) ^ k << 5;  // the swizzle is an exclusive or, too
  }
  // The compiler keeps loads and stores in their order, so loads that can wait together come first.
  __device__ __forceinline__ void load(uint32_t (&v)[4], const uint8_t* panel, int k) const {
    ptx::ldmatrix_x4(v, place(panel, k));
  }
  __device__ __forceinline__ void store(uint8_t* panel, int k, const uint32_t (&v)[4]) const {
    ptx::stmatrix_x4(place(panel, k), v);
  }
  __device__ __forceinline__ void store_rounded(uint8_t* panel, const float* v) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i] = pack<true>(v[k * 8 + i * 2], v[k * 8 + i * 2 + 1]);
      store(panel, k, pairs);
    }
  }
  // For the warp; what the tensor cores or the copy engine read next has been fenced.
  __device__ __forceinline__ void arrive(uint64_t* barrier) const {
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(barrier);
  }
  // Sends 128 columns of sums to memory, through a panel of which each warp uses its own rows.
  __device__ __forceinline__ void send(const CUtensorMap* map, uint8_t* panel, const float (&v)[64], int column_,
                                       int token, int batch) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      store_rounded(panel, v + half * 32);
      ptx::fence_async_proxy();
      __syncwarp();
      if (lane == 0) {
        ptx::tma_store_3d(map, panel + warp * 16 * PANEL_ROW_BYTES, column_ + half * 64, token + warp * 16, batch);
        ptx::tma_store_commit();
        ptx::tma_store_wait_read<0>();
      }
      __syncwarp();
    }
  }
};

}  // namespace
}  // namespace yaongi
