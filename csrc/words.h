// Steps 1 and 2 of a distance function on the CPU: sites and wanted pixels as bits, and the nearest sites of columns.
#ifndef CONTEXTRAST_WORDS_H
#define CONTEXTRAST_WORDS_H

#include <string.h>

#include <limits>

#include "volume.h"

namespace contextrast {
namespace {

constexpr int MARKED = 4;  // rows of a band that are marked together

// (B, bands, y, x) each. Where there is one band, no carries. `pending` is (B, bands, y, groups of eight along x): a
// bit is set where one of the eight pixels is pending.
struct Words {
  uint32_t *sites, *carries = nullptr, *wanted = nullptr, *pending;

  Words(Scratch &scratch, const Volume &volume, bool edges) {
    const int64_t count = volume.batch * volume.bands() * volume.plane() + 8;  // rows are read by eight words
    sites = scratch.take<uint32_t>(count);
    if (volume.bands() > 1) carries = scratch.take<uint32_t>(count);
    if (edges) wanted = scratch.take<uint32_t>(count);
    pending = scratch.take<uint32_t>(volume.batch * volume.bands() * volume.size[1] * groups(volume.size[2]));
  }

  static int groups(int width) { return (width + 15) / 16 * 2; }  // an even number: the largest block has two
};

// ---- 1. Mark. Values are compared as signed integers of their width.

// What a type's bits mean.
struct Meaning {
  int width;          // in bytes
  bool has_sign;      // of integers: negative values are outside of every class
  bool ignores_sign;  // of floating point: -0 is zero

  explicit Meaning(int32_t type) {
    switch (type) {
      case CONTEXTRAST_UINT8:
      case CONTEXTRAST_INT8: width = 1; break;
      case CONTEXTRAST_INT16:
      case CONTEXTRAST_UINT16:
      case CONTEXTRAST_FLOAT16:
      case CONTEXTRAST_BFLOAT16: width = 2; break;
      case CONTEXTRAST_INT32:
      case CONTEXTRAST_UINT32:
      case CONTEXTRAST_FLOAT32: width = 4; break;
      default: width = 8;
    }
    has_sign = type != CONTEXTRAST_UINT8 && type < CONTEXTRAST_UINT16;
    ignores_sign = type >= CONTEXTRAST_FLOAT16 && type <= CONTEXTRAST_FLOAT64;
  }
};

// body(T()) for the signed integer of a width.
template <class Body>
void with_width(int width, const Body &body) {
  switch (width) {
    case 1: return body(int8_t());
    case 2: return body(int16_t());
    case 4: return body(int32_t());
    default: return body(int64_t());
  }
}

// One row, whose pixels lie `step` elements apart. A pixel is nonzero if a bit of the mask `counts` is set in it.
template <class T>
CONTEXTRAST_HD void mark_zeros(const T *__restrict here, int64_t step, int width, T counts, int bit,
                               uint32_t *__restrict sites) {
  for (int64_t x = 0; x < width; ++x) sites[x] |= static_cast<uint32_t>((here[x * step] & counts) == 0) << bit;
}

// How far the neighbours of a pixel lie in memory, 0 beyond a border of the image. For several rows of a band at once,
// `up` is the first row's and `down` is the last row's.
struct Neighbours {
  int64_t up, down, above, below;
};

// One pixel of each of ROWS rows, `across` elements apart. BESIDE: there are neighbours along y, as in volumes.
template <int ROWS, bool BESIDE, class T>
CONTEXTRAST_HD void mark_edge(const T *here, int64_t across, const Neighbours &to, int64_t left, int64_t right,
                              bool has_sign, int bit, uint32_t &sites, uint32_t &wanted) {
  uint32_t own_sites = 0, own_wanted = 0;
  for (int row = 0; row < ROWS; ++row, here += across) {
    const T own = *here, up = here[row == 0 ? to.up : -across], down = here[row == ROWS - 1 ? to.down : across];
    const bool is_wanted = !has_sign | (own >= T(0));
    auto differing = (own ^ up) | (own ^ down) | (own ^ here[left]) | (own ^ here[right]);
    if constexpr (BESIDE) differing |= (own ^ here[to.above]) | (own ^ here[to.below]);
    own_sites |= static_cast<uint32_t>(is_wanted & (differing != 0)) << row;
    own_wanted |= static_cast<uint32_t>(is_wanted) << row;
  }
  sites |= own_sites << bit;
  wanted |= own_wanted << bit;
}

template <int ROWS, bool BESIDE, class T>
CONTEXTRAST_HD void mark_edges(const T *__restrict here, int64_t across, int64_t step, const Neighbours &to, int width,
                               bool has_sign, int bit, uint32_t *__restrict sites, uint32_t *__restrict wanted) {
  const int64_t last = width - 1;
  for (int64_t x = 1; x < last; ++x)
    mark_edge<ROWS, BESIDE>(here + x * step, across, to, -step, step, has_sign, bit, sites[x], wanted[x]);
  for (const int64_t x : {int64_t(0), last})
    mark_edge<ROWS, BESIDE>(here + x * step, across, to, x > 0 ? -step : 0, x < last ? step : 0, has_sign, bit,
                            sites[x], wanted[x]);
}

// Rows z..z+ROWS-1 of a band.
template <int ROWS, class T>
CONTEXTRAST_HD void mark_edges(const Volume &volume, bool has_sign, const T *here, int z, int y, int bit,
                               uint32_t *sites, uint32_t *wanted) {
  const int width = volume.size[2];
  const int64_t across = volume.stride[0], along = volume.stride[1], step = volume.stride[2];
  const Neighbours to{z > 0 ? -across : 0, z + ROWS < volume.size[0] ? across : 0, y > 0 ? -along : 0,
                      y + 1 < volume.size[1] ? along : 0};
  if (step != 1)
    mark_edges<ROWS, true>(here, across, step, to, width, has_sign, bit, sites, wanted);
  else if (volume.size[1] > 1)
    mark_edges<ROWS, true>(here, across, 1, to, width, has_sign, bit, sites, wanted);
  else
    mark_edges<ROWS, false>(here, across, 1, to, width, has_sign, bit, sites, wanted);
}

// The words of row y of one band, which starts at plane `top`.
template <class T>
CONTEXTRAST_CLONES void mark_words(const Volume &volume, const Meaning &meaning, const T *image, int top, int y,
                                   uint32_t *sites, uint32_t *wanted, uint32_t *pending) {
  const int width = volume.size[2];
  const int64_t across = volume.stride[0], along = volume.stride[1], step = volume.stride[2];
  const T counts = meaning.ignores_sign ? std::numeric_limits<T>::max() : T(-1);
  memset(sites, 0, static_cast<size_t>(width) * sizeof *sites);
  if (wanted) memset(wanted, 0, static_cast<size_t>(width) * sizeof *wanted);
  const int end = lesser(top + BAND, volume.size[0]);
  for (int z = top; z < end;) {
    const T *here = image + z * across + y * along;
    const int bit = z - top;
    if (wanted && z + MARKED <= end) {
      mark_edges<MARKED>(volume, meaning.has_sign, here, z, y, bit, sites, wanted);
      z += MARKED;
      continue;
    }
    if (wanted)
      mark_edges<1>(volume, meaning.has_sign, here, z, y, bit, sites, wanted);
    else if (step == 1)
      mark_zeros(here, 1, width, counts, bit, sites);
    else
      mark_zeros(here, step, width, counts, bit, sites);
    ++z;
  }
  for (int group = 0; group < Words::groups(width); ++group) {
    uint32_t found = 0;
    for (int x = 8 * group; x < lesser(8 * group + 8, width); ++x)
      found |= (wanted ? wanted[x] : ~uint32_t(0)) & ~sites[x];
    pending[group] = found;
  }
}

// ---- 2. Carry: columns first..last-1 of one image

CONTEXTRAST_CLONES void carry_columns(const uint32_t *sites, uint32_t *carries, int64_t bands, int64_t plane,
                                      int64_t first, int64_t last) {
  for (int64_t x = first; x < last; ++x) carries[x] = pack_carry(NO_SITE, 0);
  for (int64_t band = 1; band < bands; ++band) {
    const uint32_t *word = sites + (band - 1) * plane, *from = carries + (band - 1) * plane;
    uint32_t *to = carries + band * plane;
    for (int64_t x = first; x < last; ++x) to[x] = pack_carry(pass_down(word[x], carry_above(from[x])), 0);
  }
  for (int64_t x = first; x < last; ++x) carries[(bands - 1) * plane + x] |= pack_carry(0, NO_SITE);
  for (int64_t band = bands - 2; band >= 0; --band) {
    const uint32_t *word = sites + (band + 1) * plane, *from = carries + (band + 1) * plane;
    uint32_t *to = carries + band * plane;
    for (int64_t x = first; x < last; ++x) to[x] |= pack_carry(0, pass_up(word[x], carry_below(from[x])));
  }
}

}  // namespace
}  // namespace contextrast
#endif
