// What a part of a group has in common with the next: dB and dC of a chunk, which each part starts from the sums of the
// part before. They pass through memory, in fact the L2 cache, in the order of the threads' registers. See backward.cu.
#pragma once

#include "mamba_scan/walk.cuh"

namespace yaongi {
namespace {

enum class Passed { dc, db };

__device__ __forceinline__ float4* place_of(const Problem& p, Passed which, int slot, int block, const Thread& t) {
  return p.passed + ((int64_t(block) * SLOTS + slot) * 2 + static_cast<int>(which)) * (16 * WARPGROUP) + t.thread;
}

__device__ __forceinline__ bool is_last(const Shared& s, const Problem& p) { return s.place.part + 1 == p.parts; }

// The sums that a chunk starts from.
__device__ __forceinline__ void take(Shared& s, const Problem& p, const Thread& t, Passed which, int turn,
                                     float (&sums)[64]) {
  if (s.place.part == 0) {
#pragma unroll
    for (int i = 0; i < 64; ++i) sums[i] = 0;
    return;
  }
  ptx::barrier_acquire(&s.received[turn % SLOTS], turn / SLOTS & 1);
  const float4* from = place_of(p, which, turn % SLOTS, blockIdx.x, t);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float4 v = ptx::load_float4(from + i * WARPGROUP);
    sums[i * 4] = v.x, sums[i * 4 + 1] = v.y, sums[i * 4 + 2] = v.z, sums[i * 4 + 3] = v.w;
  }
}

// After `take`, when the sums are in registers for certain, since products have taken them: their place is free.
__device__ __forceinline__ void vacate(Shared& s, const Thread& t, int turn) {
  if (s.place.part == 0) return;
  __syncwarp();
  if (t.lane == 0) ptx::barrier_arrive_at(&s.vacated[turn % SLOTS], s.place.part - 1);
}

// The sums that the next part starts a chunk from.
__device__ __forceinline__ void pass(Shared& s, const Problem& p, const Thread& t, Passed which, int turn,
                                     const float (&sums)[64]) {
  ptx::barrier_wait(&s.vacated[turn % SLOTS], (turn / SLOTS & 1) ^ 1);
  float4* to = place_of(p, which, turn % SLOTS, blockIdx.x + 1, t);
#pragma unroll
  for (int i = 0; i < 16; ++i)
    to[i * WARPGROUP] = float4{sums[i * 4], sums[i * 4 + 1], sums[i * 4 + 2], sums[i * 4 + 3]};
  t.arrive(&s.sent[turn % SLOTS]);
}

}  // namespace
}  // namespace yaongi
