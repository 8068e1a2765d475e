// A ring of shared-memory stages between a producer (TMA) and consumers (the tensor cores).
#pragma once

#include <cstdint>

namespace yaongi {

// Place in the ring: the stage, and the parity of how often the ring went round, which tells a barrier's phases apart.
template <int STAGES>
struct RingPosition {
  uint32_t stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(uint32_t steps = 1) {
    stage += steps;
    parity ^= (stage / STAGES) & 1;
    stage %= STAGES;
  }
};

// full: the stage holds data; empty: its readers are done. A producer waits on `empty` with the opposite parity, so that
// the first round passes at once.
template <int STAGES>
struct RingBarriers {
  uint64_t full[STAGES];
  uint64_t empty[STAGES];
};

}  // namespace yaongi
