// The reverse walk's producer: threads and a warp that command the copy engine. See backward.cu.
#pragma once

#include "mamba_scan/walk.cuh"

namespace yaongi {
namespace {

// x, dy, h and the steps of each head, two steps ahead.
__device__ __forceinline__ void load_operands(Shared& s, const Problem& p, const CUtensorMap* x, const CUtensorMap* dy,
                                              const CUtensorMap* h) {
  const Place& w = s.place;
  for (Step step; step.turn < w.count; step.advance()) {
    Stage& in = s.stages[step.stage()];
    uint64_t* full = &s.ring.full[step.stage()];
    const int column = (w.head + step.head) * P, token = w.token(step.turn);
    const int64_t row = p.row(w, step.head);
    ptx::barrier_wait(&s.ring.empty[step.stage()], step.parity() ^ 1);
    ptx::barrier_arrive_expect(full, sizeof(Stage));
    ptx::tma_load_3d(in.dy, dy, full, column, token, w.batch);
    ptx::tma_load_3d(in.x, x, full, column, token, w.batch);
    for (int i = 0; i < PLANES; ++i)
      ptx::bulk_load(in.steps[i], p.steps + (row * PLANES + i) * p.padded + token, Q * sizeof(float), full);
    ptx::tma_load_3d(in.h, h, full, 0, 0, row * p.chunks + token / Q);
  }
}

// b and c of each chunk; they have one buffer, so they wait for the chunk before.
__device__ __forceinline__ void load_chunks(Shared& s, const CUtensorMap* b, const CUtensorMap* c) {
  const Place& w = s.place;
  for (int turn = 0; turn < w.count; ++turn) {
    const int token = w.token(turn);
    ptx::barrier_wait(&s.chunk_empty, (turn & 1) ^ 1);
    ptx::barrier_arrive_expect(&s.chunk_full, 4 * PANEL_BYTES);
    for (int half = 0; half < 2; ++half) {
      ptx::tma_load_3d(s.c[half], c, &s.chunk_full, w.group * N + half * 64, token, w.batch);
      ptx::tma_load_3d(s.b[half], b, &s.chunk_full, w.group * N + half * 64, token, w.batch);
    }
    for (int half = 0; half < 2 && turn + 1 < w.count; ++half) {
      ptx::tma_prefetch_3d(c, w.group * N + half * 64, token - Q, w.batch);
      ptx::tma_prefetch_3d(b, w.group * N + half * 64, token - Q, w.batch);
    }
  }
}

// A warp that takes away what a step has made: dx and the sums.
__device__ __forceinline__ void store_steps(Shared& s, const Problem& p, uint32_t lane, const CUtensorMap* dx) {
  const Place& w = s.place;
  for (Step step; step.turn < w.count; step.advance()) {
    const int token = w.token(step.turn);
    ptx::barrier_wait(&s.done[step.stage()], step.parity());
    if (lane == 0) {
      ptx::tma_store_3d(dx, s.stages[step.stage()].x, (w.head + step.head) * P, token, w.batch);
      ptx::tma_store_commit();
    }
    float4* out = reinterpret_cast<float4*>(p.sums) + p.row(w, step.head) * p.padded + token;
#pragma unroll
    for (int i = 0; i < Q; i += 32) {
      const Sums& sums = s.sums[step.stage()];
      float4 v = sums.inputs[i + lane];
      v.y += sums.outputs[i + lane];
      if (i + lane == Q - 1) v.y += sums.passing[0] + sums.passing[1] + sums.passing[2] + sums.passing[3];
      out[i + lane] = v;
    }
    __syncwarp();
    if (lane == 0) {
      ptx::tma_store_wait_read<0>();
      ptx::barrier_arrive(&s.ring.empty[step.stage()]);
    }
  }
}

// Tells the next part that the sums of a chunk, of both sides, are in memory. A thread of its own, since the release of
// what other threads have written waits for it.
__device__ __forceinline__ void pass_on(Shared& s) {
  for (int turn = 0; turn < s.place.count; ++turn) {
    ptx::barrier_wait(&s.sent[turn % SLOTS], turn / SLOTS & 1);
    ptx::barrier_release_at(&s.received[turn % SLOTS], s.place.part + 1);
  }
}

}  // namespace
}  // namespace yaongi
