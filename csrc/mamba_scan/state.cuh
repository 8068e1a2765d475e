// The reverse walk's side of the state: g, the gradient of the state, from chunk to chunk. See backward.cu.
#pragma once

#include "mamba_scan/walk.cuh"

namespace yaongi {
namespace {

// t · half of g, 64 × 64; returns the thread's part of ⟨g, h⟩.
__device__ __forceinline__ float load_carried(const Carried& g, const Stage& in, const Thread& t, int half,
                                              float through, float (&scaled_g)[32]) {
  float product = 0;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint4 four = g.low[half * 2 + j][t.thread];
    uint32_t highs[2][4], hs[2][4];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      t.load(highs[k], g.high + half * PANEL_BYTES, j * 2 + k);
      t.load(hs[k], in.h + half * PANEL_BYTES, j * 2 + k);
    }
    const uint32_t lows[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int k = j * 2; k < j * 2 + 2; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t low = lows[k % 2 * 2 + i / 2];
        const float2 v = i % 2 ? float2{joined<2>(highs[k % 2][i], low), joined<3>(highs[k % 2][i], low)}
                               : float2{joined<0>(highs[k % 2][i], low), joined<1>(highs[k % 2][i], low)};
        add_product(product, v, halves(hs[k % 2][i]));
        scaled_g[k * 8 + i * 2] = through * v.x;
        scaled_g[k * 8 + i * 2 + 1] = through * v.y;
      }
    }
  }
  return product;
}

__device__ __forceinline__ void store_carried(Carried& to, const Thread& t, int half, const float (&g)[32]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    uint32_t lows[4];
#pragma unroll
    for (int k = j * 2; k < j * 2 + 2; ++k) {
      uint32_t highs[4];
      split(g + k * 8, highs[0], highs[1], lows[k % 2 * 2]);
      split(g + k * 8 + 4, highs[2], highs[3], lows[k % 2 * 2 + 1]);
      t.store(to.high + half * PANEL_BYTES, k, highs);
    }
    to.low[half * 2 + j][t.thread] = uint4{lows[0], lows[1], lows[2], lows[3]};
  }
}

// Where `low` has the byte of element (n, p); those of p + 1 and of (n + 8, p) follow.
__device__ __forceinline__ int low_place(int n, int p) {
  const int thread = n % 64 / 16 * 32 + n % 8 * 4 + p % 8 / 2;
  return ((n / 64 * 2 + p / 32) * WARPGROUP + thread) * 16 + p / 8 % 4 * 4 + n / 8 % 2 * 2 + p % 2;
}

// Before the walk, by the whole block: the gradients that enter the segment.
__device__ __forceinline__ void split_entry(Shared& s, const Problem& p) {
  const Place& w = s.place;
  const int64_t rows = int64_t(gridDim.x / p.segments) * HEADS;
  const float* entry = p.entry ? p.entry + (w.segment * rows + p.row(w, 0)) * P * N : nullptr;
  for (int i = threadIdx.x; i < HEADS * N * P / 8; i += THREADS) {
    const int n = i % N, column = i / N % (P / 8) * 8, head = i / (N * P / 8);
    uint32_t high[4];
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
      float g[4] = {};
#pragma unroll
      for (int j = 0; j < 4 && entry; ++j) g[j] = entry[(int64_t(head) * P + column + k * 2 + j) * N + n];
      uint32_t low;
      split(g, high[k], high[k + 1], low);
      uint8_t* to = reinterpret_cast<uint8_t*>(s.carried[head].low);
      *reinterpret_cast<uint16_t*>(to + low_place(n, column + k * 2)) = static_cast<uint16_t>(low);
      *reinterpret_cast<uint16_t*>(to + low_place(n, column + k * 2 + 2)) = static_cast<uint16_t>(low >> 16);
    }
    *reinterpret_cast<uint4*>(s.carried[head].high + swizzled_offset(n, column / 8)) =
        uint4{high[0], high[1], high[2], high[3]};
  }
  ptx::fence_async_proxy();
}

// After the walk, by the side of the state: the gradients of the row's first state.
__device__ __forceinline__ void join_first(const Shared& s, const Problem& p, const Thread& t) {
  float* first = p.first + p.row(s.place, 0) * P * N;
#pragma unroll 1
  for (int i = t.thread; i < HEADS * N * P / 2; i += WARPGROUP) {
    const int n = i % N, column = i / N % (P / 2) * 2, head = i / (N * P / 2);
    const Carried& g = s.carried[head];
    const uint32_t high =
        *reinterpret_cast<const uint32_t*>(g.high + swizzled_offset(n, column / 8) + column % 8 * 2);
    const uint32_t low =
        *reinterpret_cast<const uint16_t*>(reinterpret_cast<const uint8_t*>(g.low) + low_place(n, column));
    float* to = first + (int64_t(head) * P + column) * N + n;
    to[0] = joined<0>(high, low);
    to[N] = joined<1>(high, low);
  }
}

__device__ __forceinline__ void state_side(Shared& s, const Problem& p, const Thread t) {
  const Place& w = s.place;
  for (int turn = 0; turn < w.count; ++turn) {
    ptx::barrier_wait(&s.chunk_full, turn & 1);
#pragma unroll 1
    for (int head = 0; head < HEADS; ++head) {
      const Step step = {turn, head};
      const Stage& in = s.stages[step.stage()];
      Carried& carried = s.carried[head];
      ptx::barrier_wait(&s.ring.full[step.stage()], step.parity());
      const float through = exp2_fast(in.steps[0][Q - 1]);
      float passing = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float g[32];
        passing += load_carried(carried, in, t, half, through, g);
        if (half == 0) ptx::barrier_wait(&s.edy_written, step.edy_parity());
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; ++i)
          multiply<1, 1>(g, rows_descriptor(s.c[half]) + i * SIXTEEN_ROWS,
                         rows_descriptor(s.edy) + i * SIXTEEN_ROWS, true);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        if (half == 0) ptx::barrier_wait(&s.g_read[head], turn & 1);
        if (half == 1) t.arrive(&s.edy_read);
        store_carried(carried, t, half, g);
      }
      passing *= through;
#pragma unroll
      for (int i = 16; i > 0; i /= 2) passing += __shfl_xor_sync(~0u, passing, i);
      if (t.lane == 0) s.sums[step.stage()].passing[t.warp] = passing;
      ptx::fence_async_proxy();
      t.arrive(&s.g_written[head]);
      if (t.lane == 0) ptx::barrier_arrive(&s.done[step.stage()]);
    }
    t.arrive(&s.chunk_empty);
  }
  if (p.first && w.segment == 0) {
    ptx::named_barrier_sync(2, WARPGROUP);
    join_first(s, p, t);
  }
}

}  // namespace
}  // namespace yaongi
