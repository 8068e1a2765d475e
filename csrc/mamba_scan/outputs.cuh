// The reverse walk's side of the outputs: what a chunk's output tokens have met. See backward.cu.
#pragma once

#include "mamba_scan/parts.cuh"

namespace yaongi {
namespace {

// S = c·bᵀ; the diagonal, which no decay is on, goes to `own`, and is zero in `scores`.
__device__ __forceinline__ void form_scores(Shared& s, const Thread& t, float* own) {
  float S[32];
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < 8; ++i)
    multiply<0, 0>(S, columns_descriptor(s.c[i / 4]) + i % 4 * SIXTEEN_COLUMNS,
                   columns_descriptor(s.b[i / 4]) + i % 4 * SIXTEEN_COLUMNS, i > 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int row = t.row + i / 2 % 2 * 8, column = i / 4 * 8 + t.column + i % 2;
    if (row == column) {
      own[row] = S[i];
      S[i] = 0;
    }
  }
  float2(*mine)[4][32] = s.scores + t.warp * (t.warp + 1) / 2;
#pragma unroll
  for (int i = 0; i < 16; ++i)
    if (i / 4 <= t.warp) mine[i / 4][i % 4][t.lane] = float2{S[i * 2], S[i * 2 + 1]};
}

// With `products` dy·xᵀ: dS += E∘products, mix = E∘S; returns the row sums of S∘E∘products. A chunk's exponents reach
// 64 · 256 at most, so their sums in float32 are exact enough for bfloat16.
__device__ __forceinline__ float2 mix_step(Shared& s, const Thread& t, const Stage& in,
                                           const float (&products)[32], float (&dS)[32]) {
  const float to[2] = {in.steps[0][t.row] + in.steps[1][t.row], in.steps[0][t.row + 8] + in.steps[1][t.row + 8]};
  const float2(*mine)[4][32] = s.scores + t.warp * (t.warp + 1) / 2;
  float within[2] = {0, 0};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t pairs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = k * 4 + j, r = j % 2, row = t.row + r * 8, column = i / 2 * 8 + t.column;
      const float2 sum = *reinterpret_cast<const float2*>(&in.steps[0][column]);
      const float2 step = *reinterpret_cast<const float2*>(&in.steps[2][column]);
      const float d0 = row >= column ? exp2_fast(to[r] - (sum.x + step.x)) : 0.f;
      const float d1 = row >= column + 1 ? exp2_fast(to[r] - (sum.y + step.y)) : 0.f;
      const float2 score = k <= t.warp ? mine[k][j][t.lane] : float2{};
      const float2 product = {products[i * 2], products[i * 2 + 1]};
      dS[i * 2] = fmaf(product.x, d0, dS[i * 2]);
      dS[i * 2 + 1] = fmaf(product.y, d1, dS[i * 2 + 1]);
      pairs[j] = pack<true>(score.x * d0, score.y * d1);
      add_product(within[r], halves(pairs[j]), product);  // rounded, as the inputs' side takes it: these terms cancel
    }
    t.store(s.mix, k, pairs);
  }
  return {within[0], within[1]};
}

__device__ __forceinline__ void outputs_side(Shared& s, const Problem& p, const Thread t, const CUtensorMap* dc_map) {
  const Place& w = s.place;
  for (int turn = 0; turn < w.count; ++turn) {
    float dS[32] = {}, dC[64];
    take(s, p, t, Passed::dc, turn, dC);
#pragma unroll 1
    for (int head = 0; head < HEADS; ++head) {
      const Step step = {turn, head};
      const Stage& in = s.stages[step.stage()];
      ptx::barrier_wait(&s.ring.full[step.stage()], step.parity());
      float products[32], y[32];
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i)
        multiply<0, 0>(products, columns_descriptor(in.dy) + i * SIXTEEN_COLUMNS,
                       columns_descriptor(in.x) + i * SIXTEEN_COLUMNS, i > 0);
      ptx::wgmma_commit();
      ptx::barrier_wait(&s.edy_read, step.edy_parity() ^ 1);
      const float into[2] = {exp2_fast(in.steps[0][t.row]), exp2_fast(in.steps[0][t.row + 8])};
      uint32_t weighted[4][4];
#pragma unroll
      for (int k = 0; k < 4; ++k) t.load(weighted[k], in.dy, k);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) weighted[k][i] = scaled(weighted[k][i], into[i % 2]);
        t.store(s.edy, k, weighted[k]);
      }
      ptx::fence_async_proxy();
      t.arrive(&s.edy_written);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k)
        multiply<0>(dC, weighted[k], columns_descriptor(in.h) + k * SIXTEEN_COLUMNS, true);
      ptx::wgmma_commit();
      if (head == 0) {
        ptx::barrier_wait(&s.chunk_full, turn & 1);
        form_scores(s, t, s.own[turn & 1]);
      }
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < 8; ++i)
        multiply<0, 1>(y, columns_descriptor(s.c[i / 4]) + i % 4 * SIXTEEN_COLUMNS,
                       rows_descriptor(in.h) + i * SIXTEEN_ROWS, i > 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<2>();
      ptx::barrier_wait(&s.mix_read, step.mix_parity() ^ 1);
      const float2 within = mix_step(s, t, in, products, dS);
      ptx::fence_async_proxy();
      t.arrive(&s.mix_written);
      uint32_t dy[4][4];
#pragma unroll
      for (int k = 0; k < 4; ++k) t.load(dy[k], in.dy, k);
      ptx::wgmma_wait<0>();
      float entering[2] = {0, 0};
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          add_product(entering[i % 2], halves(dy[k][i]), {y[k * 8 + i * 2], y[k * 8 + i * 2 + 1]});
      const float sums[2] = {sum_of_four(within.x + into[0] * entering[0]),
                             sum_of_four(within.y + into[1] * entering[1])};
      if (t.lane % 4 == 0) {
        s.sums[step.stage()].outputs[t.row] = sums[0];
        s.sums[step.stage()].outputs[t.row + 8] = sums[1];
      }
      t.arrive(&s.done[step.stage()]);
    }
    // The chunk's end: dS for the inputs' side, dC += dS·b.
    const Thread e = Thread::anew();
    ptx::barrier_wait(&s.mix_read, Step{turn, HEADS}.mix_parity() ^ 1);
    uint32_t narrow[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) narrow[k][i] = pack<true>(dS[k * 8 + i * 2], dS[k * 8 + i * 2 + 1]);
      e.store(s.mix, k, narrow[k]);
    }
    ptx::fence_async_proxy();
    e.arrive(&s.mix_written);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) multiply<1>(dC, narrow[k], rows_descriptor(s.b[0]) + k * SIXTEEN_ROWS, true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    e.arrive(&s.chunk_empty);
    if (p.flags) {
      flag_broken(p, dS);
      flag_broken(p, dC);
    }
    vacate(s, e, turn);
    if (is_last(s, p)) {
      ptx::barrier_wait(&s.edy_read, Step{turn, HEADS}.edy_parity() ^ 1);
      e.send(dc_map, s.edy, dC, w.group * N, w.token(turn), w.batch);
    } else {
      pass(s, p, e, Passed::dc, turn, dC);
    }
  }
}

}  // namespace
}  // namespace yaongi
