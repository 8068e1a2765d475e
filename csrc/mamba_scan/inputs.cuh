// The reverse walk's side of the inputs: what a chunk's input tokens have reached. See backward.cu.
#pragma once

#include "mamba_scan/parts.cuh"

namespace yaongi {
namespace {

// dx = own·dy + dX + o·(b·g), in x's place, and the sums of its terms' products with x.
__device__ __forceinline__ void finish_inputs(Stage& in, Sums& sums, const Thread& t, const float (&dX)[32],
                                              const float (&leaving)[32], const float (&out)[2],
                                              const float (&own_step)[2], float D) {
  const float own[2] = {own_step[0] + D, own_step[1] + D};
  float left[2] = {0, 0}, direct[2] = {0, 0}, skip[2] = {0, 0};
  uint32_t x[2][4], dy[2][4];
  t.load(x[0], in.x, 0);
  t.load(dy[0], in.dy, 0);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t dx[4];
    if (k < 3) {  // the next columns, meanwhile
      t.load(x[(k + 1) % 2], in.x, k + 1);
      t.load(dy[(k + 1) % 2], in.dy, k + 1);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i % 2, j = k * 8 + i * 2;
      const float2 xs = halves(x[k % 2][i]), dys = halves(dy[k % 2][i]);
      add_product(left[r], xs, {leaving[j], leaving[j + 1]});
      add_product(direct[r], xs, {dX[j], dX[j + 1]});
      add_product(skip[r], xs, dys);
      dx[i] = pack<true>(fmaf(out[r], leaving[j], fmaf(own[r], dys.x, dX[j])),
                         fmaf(out[r], leaving[j + 1], fmaf(own[r], dys.y, dX[j + 1])));
    }
    t.store(in.x, k, dx);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    left[r] = out[r] * sum_of_four(left[r]);
    direct[r] = sum_of_four(direct[r]);
    skip[r] = sum_of_four(skip[r]);
    if (t.lane % 4 == 0)
      sums.inputs[t.row + r * 8] =
          float4{direct[r] + left[r] + own_step[r] * skip[r], -direct[r], left[r], skip[r]};
  }
}

__device__ __forceinline__ void inputs_side(Shared& s, const Problem& p, const Thread t, const CUtensorMap* db_map) {
  const Place& w = s.place;
  for (int turn = 0; turn < w.count; ++turn) {
    float dB[64];
    take(s, p, t, Passed::db, turn, dB);
    ptx::barrier_wait(&s.chunk_full, turn & 1);
#pragma unroll 1
    for (int head = 0; head < HEADS; ++head) {
      const Step step = {turn, head};
      Stage& in = s.stages[step.stage()];
      const uint8_t* high = s.carried[head].high;
      ptx::barrier_wait(&s.ring.full[step.stage()], step.parity());
      const float out[2] = {in.steps[3][t.row], in.steps[3][t.row + 8]};
      uint32_t weighted[4][4];
#pragma unroll
      for (int k = 0; k < 4; ++k) t.load(weighted[k], in.x, k);
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) weighted[k][i] = scaled(weighted[k][i], out[i % 2]);
      ptx::barrier_wait(&s.g_written[head], (turn & 1) ^ 1);
      float leaving[32], dX[32];
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < 8; ++i)
        multiply<0, 1>(leaving, columns_descriptor(s.b[i / 4]) + i % 4 * SIXTEEN_COLUMNS,
                       rows_descriptor(high) + i * SIXTEEN_ROWS, i > 0);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        multiply<0>(dB, weighted[k], columns_descriptor(high) + k * SIXTEEN_COLUMNS, true);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      t.arrive(&s.g_read[head]);
      ptx::barrier_wait(&s.mix_written, step.mix_parity());
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i)
        multiply<1, 1>(dX, rows_descriptor(s.mix) + i * SIXTEEN_ROWS, rows_descriptor(in.dy) + i * SIXTEEN_ROWS,
                       i > 0);
      ptx::wgmma_commit();
      float own_step[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = t.row + r * 8;
        own_step[r] = s.own[turn & 1][row] * exp2_fast(in.steps[1][row] - in.steps[2][row]);
      }
      ptx::wgmma_wait<0>();
      t.arrive(&s.mix_read);
      finish_inputs(in, s.sums[step.stage()], t, dX, leaving, out, own_step, p.D ? p.D[w.head + head] : 0.f);
      ptx::fence_async_proxy();
      t.arrive(&s.done[step.stage()]);
    }
    // The chunk's end: dB += dSᵀ·c, which leaves through dS's place.
    ptx::barrier_wait(&s.mix_written, Step{turn, HEADS}.mix_parity());
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k)
      multiply<1, 1>(dB, rows_descriptor(s.mix) + k * SIXTEEN_ROWS, rows_descriptor(s.c[0]) + k * SIXTEEN_ROWS, true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    t.arrive(&s.chunk_empty);
    if (p.flags) flag_broken(p, dB);
    vacate(s, t, turn);
    if (is_last(s, p)) {
      ptx::named_barrier_sync(1, WARPGROUP);  // all four warps' products have read dS
      t.send(db_map, s.mix, dB, w.group * N, w.token(turn), w.batch);
      t.arrive(&s.mix_read);
    } else {
      t.arrive(&s.mix_read);
      pass(s, p, t, Passed::db, turn, dB);
    }
  }
}

}  // namespace
}  // namespace yaongi
