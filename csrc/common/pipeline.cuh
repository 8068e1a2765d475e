// A ring of shared-memory stages between a producer (TMA) and consumers (the tensor cores).
#pragma once

#include <cstdint>

namespace yaongi {

// Position in the ring: the stage, and the parity of the number of completed rounds, which is the phase to wait for.
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

// full: the stage holds data; empty: its readers are done. A producer waits on `empty` with the opposite parity, so the
// waits of the first round return at once.
template <int STAGES>
struct RingBarriers {
  uint64_t full[STAGES];
  uint64_t empty[STAGES];
};

}  // namespace yaongi
