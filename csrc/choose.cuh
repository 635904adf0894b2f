// How select.cu's kernel `choose` finds the rank of a segment's last selected pixel: by bins of distances, then by
// digits of 11 bits of the rank, until few candidates are left. Integer distances below 128 and their ties take one
// round of each.
#ifndef CONTEXTRAST_CHOOSE_CUH
#define CONTEXTRAST_CHOOSE_CUH

#include "device.cuh"
#include "ranks.h"

namespace contextrast {
namespace {

constexpr int CHOOSERS = 256;  // threads
constexpr int KEPT = 16;       // ranks that a thread keeps in registers
constexpr uint32_t CHUNK = CHOOSERS * KEPT;
constexpr int DIGIT_BITS = 11;
constexpr int COUNTERS = 1 << DIGIT_BITS;
constexpr uint32_t FEW = 256;  // candidates that are compared with each other
static_assert(BINS <= COUNTERS && COUNTERS % CHOOSERS == 0 && FEW <= CHOOSERS, "sizes of choose");

struct Counter {
  uint32_t number, before, size;  // the candidates in the counters before it, and in it
};

struct ChooseShared {
  uint32_t counters[COUNTERS];
  uint64_t candidates[FEW];
  uint32_t warp_sums[CHOOSERS / WARP];
  uint32_t num_candidates;
  int32_t lowest;  // distance
  Counter found;
  uint64_t threshold;
};

// A segment as the threads of a block see it.
struct Chooser {
  ChooseShared &shared;
  const uint32_t *list;  // its pixels
  uint32_t size;
  const int32_t *distance_sq;  // of the image's pixels, or null: all equal
  uint32_t key;
  uint64_t kept[KEPT];

  __device__ void read(uint32_t chunk) {
    uint32_t pixels[KEPT];
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      const uint32_t entry = chunk + i * CHOOSERS + threadIdx.x;
      pixels[i] = entry < size ? list[entry] : 0;
    }
#pragma unroll
    for (int i = 0; i < KEPT; ++i) kept[i] = rank(distance_sq ? distance_sq[pixels[i]] : 0, hash(pixels[i], key));
  }

  // body(rank, entry of the list) for this thread's part of the segment, which is read again only if it is long.
  template <class Body>
  __device__ void for_ranks(const Body &body) {
    for (uint32_t chunk = 0; chunk < size; chunk += CHUNK) {
      if (size > CHUNK) read(chunk);
#pragma unroll
      for (int i = 0; i < KEPT; ++i) {
        const uint32_t entry = chunk + i * CHOOSERS + threadIdx.x;
        if (entry < size) body(kept[i], entry);
      }
    }
  }

  // Counts counter_of(rank), -1 for none, and finds the counter that holds the wanted-th candidate, from 1.
  template <class CounterOf>
  __device__ Counter count(uint32_t wanted, const CounterOf &counter_of) {
    constexpr int OWN = COUNTERS / CHOOSERS;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (int i = threadIdx.x; i < COUNTERS; i += CHOOSERS) shared.counters[i] = 0;
    __syncthreads();
    for_ranks([&](uint64_t rank, uint32_t) {
      const int counter = counter_of(rank);
      if (counter >= 0) atomicAdd(&shared.counters[counter], 1u);
    });
    __syncthreads();

    uint32_t own = 0;
    for (int i = 0; i < OWN; ++i) own += shared.counters[threadIdx.x * OWN + i];
    uint32_t before = own;  // and the lanes below
    for (int step = 1; step < WARP; step *= 2) {
      const uint32_t lower = __shfl_up_sync(ALL_LANES, before, step);
      if (lane >= step) before += lower;
    }
    if (lane == WARP - 1) shared.warp_sums[warp] = before;
    before -= own;
    __syncthreads();
    for (int i = 0; i < warp; ++i) before += shared.warp_sums[i];
    if (before < wanted && wanted <= before + own) {
      uint32_t counter = threadIdx.x * OWN;
      while (before + shared.counters[counter] < wanted) before += shared.counters[counter++];
      shared.found = {counter, before, shared.counters[counter]};
    }
    __syncthreads();
    return shared.found;
  }

  // The wanted-th smallest rank, from 1, for every thread.
  __device__ uint64_t threshold(uint32_t wanted) {
    uint64_t first = 0, last = ~uint64_t(0);  // the candidates' ranks
    uint32_t candidates = size;
    if (candidates > FEW && distance_sq) {
      if (threadIdx.x == 0) shared.lowest = INT32_MAX;  // before the barriers inside of count
      int32_t lowest = INT32_MAX;
      const Counter found = count(wanted, [&](uint64_t rank) {
        const int32_t distance = distance_of_rank(rank);
        lowest = lesser(lowest, distance);
        return bin_of(distance);
      });
      lowest = __reduce_min_sync(ALL_LANES, lowest);
      if (threadIdx.x % WARP == 0) atomicMin(&shared.lowest, lowest);
      __syncthreads();
      const int bin = static_cast<int>(found.number);
      first = rank(greater(bin_start(bin), shared.lowest), 0);
      if (bin + 1 < BINS) last = rank(bin_start(bin + 1), 0) - 1;
      wanted -= found.before;
      candidates = found.size;
    } else if (!distance_sq) {
      first = rank(0, 0);
      last = rank(0, ~uint32_t(0));
    }
    while (candidates > FEW && first < last) {
      const int bits = 64 - __clzll(static_cast<long long>(last - first)), shift = greater(bits - DIGIT_BITS, 0);
      const Counter found = count(wanted, [&](uint64_t rank) {
        return first <= rank && rank <= last ? static_cast<int>((rank - first) >> shift) : -1;
      });
      first += static_cast<uint64_t>(found.number) << shift;
      last = lesser<uint64_t>(last, first + ((uint64_t(1) << shift) - 1));
      wanted -= found.before;
      candidates = found.size;
    }

    if (first == last) return first;

    if (threadIdx.x == 0) shared.num_candidates = 0;
    __syncthreads();
    for_ranks([&](uint64_t rank, uint32_t) {
      if (first <= rank && rank <= last) shared.candidates[atomicAdd(&shared.num_candidates, 1u)] = rank;
    });
    __syncthreads();
    if (threadIdx.x < candidates) {
      const uint64_t own = shared.candidates[threadIdx.x];
      uint32_t smaller = 0;
      for (uint32_t i = 0; i < candidates; ++i) smaller += shared.candidates[i] < own;
      if (smaller == wanted - 1) shared.threshold = own;  // ranks differ, since hashes do
    }
    __syncthreads();
    return shared.threshold;
  }
};

}  // namespace
}  // namespace contextrast
#endif
