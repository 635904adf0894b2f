// Which pixels are selected: the hash, the order of the pixels of one class in one image, their number, and the bins of
// a histogram over that order.
#ifndef CONTEXTRAST_RANKS_H
#define CONTEXTRAST_RANKS_H

#include "lines.h"

namespace contextrast {

// ---- Hash. A bijection of 32-bit words for every seed and stream, so that no two pixels of an image tie.

constexpr uint32_t TIES = 0;  // the stream that breaks ties and draws semi-hard negatives

CONTEXTRAST_HD uint32_t mix(uint32_t x) {
  x = (x ^ x >> 15) * 0x2C1B3C6Du;
  x = (x ^ x >> 12) * 0x297A2D39u;
  return x ^ x >> 15;
}

CONTEXTRAST_HD uint32_t hash_key(int64_t seed, uint32_t stream) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  return mix(mix(mix(stream + 0x9E3779B9u) ^ static_cast<uint32_t>(bits >> 32)) ^ static_cast<uint32_t>(bits));
}

// pixel = row·W + column inside its image
CONTEXTRAST_HD uint32_t hash(uint32_t pixel, uint32_t key) { return mix(pixel ^ key); }

// ---- Order and number

// Smaller is selected first. Any int32 distance is in order, negative ones too.
CONTEXTRAST_HD uint64_t rank(int32_t distance_sq, uint32_t hash) {
  return static_cast<uint64_t>(static_cast<uint32_t>(distance_sq) ^ 0x80000000u) << 32 | hash;
}

CONTEXTRAST_HD int32_t distance_of_rank(uint64_t rank) {
  return static_cast<int32_t>(static_cast<uint32_t>(rank >> 32) ^ 0x80000000u);
}

// k = ceil(ratio · count), the product rounded once; 0..count for every ratio, 0 for NaN.
CONTEXTRAST_HD int64_t quota(double ratio, int64_t count) {
#if defined(__CUDA_ARCH__)
  const double k = ceil(__dmul_rn(ratio, static_cast<double>(count)));
#else
  const double k = ceil(ratio * static_cast<double>(count));
#endif
  if (!(k > 0)) return 0;
  return k < static_cast<double>(count) ? static_cast<int64_t>(k) : count;
}

// ---- Bins: a monotone integer function of distance_sq. One bin for each value up to 127 (negative ones join 0), then
// 8 for each octave, and one for "no edge" alone.

constexpr int EXACT_BINS = 128, OCTAVE_BINS = 8, BINS = EXACT_BINS + 24 * OCTAVE_BINS + 1;

CONTEXTRAST_HD int bin_of(int32_t distance_sq) {
  if (distance_sq < EXACT_BINS) return greater(distance_sq, 0);
  if (distance_sq == CONTEXTRAST_NO_EDGE) return BINS - 1;
  const int octave = 31 - leading_zeros(static_cast<uint32_t>(distance_sq));  // 7..30
  return EXACT_BINS + (octave - 7) * OCTAVE_BINS + ((distance_sq >> (octave - 3)) & (OCTAVE_BINS - 1));
}

// The smallest distance of a bin; the bin's ranks are rank(bin_start(bin), 0) up to, not including, those of the next.
// Bin 0 starts at INT32_MIN.
CONTEXTRAST_HD int32_t bin_start(int bin) {
  if (bin == 0) return INT32_MIN;
  if (bin < EXACT_BINS) return bin;
  if (bin == BINS - 1) return CONTEXTRAST_NO_EDGE;
  const int octave = 7 + (bin - EXACT_BINS) / OCTAVE_BINS, part = (bin - EXACT_BINS) % OCTAVE_BINS;
  return (OCTAVE_BINS + part) << (octave - 3);
}

}  // namespace contextrast
#endif
