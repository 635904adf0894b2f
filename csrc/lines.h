// The lines of an exact Euclidean distance transform: what edt.cpp and edt.cu compute for one pixel, one column strip,
// one row. Integers only.
//
// 1. Seeds. One bit a pixel. An edge pixel of class n is a pixel of n with a 4-neighbour inside the image that is not
// in n. Only edges need the
//    classes: leaving the region of p on any monotone staircase towards a farther seed q passes an edge pixel of p's
//    own region that lies in the box of p and q, hence nearer than q. So the seed nearest to p is always an edge of p's
//    class, and one binary transform serves all classes.
// 2. Columns. 32 rows of a column are a word; a carry holds the distances to the nearest seed above and below the word.
// The distance g along
//    the column is then a count of leading and one of trailing zeros.
// 3. Rows. d²(x) = min over columns u of cost(x, u) = (x-u)² + g(u)². A window around x settles it as soon as k² >=
// best, which takes about d
//    steps. Where that is long: for x1 < x2 and u1 < u2, cost(x1,u1) + cost(x2,u2) < cost(x1,u2) + cost(x2,u1) (Monge),
//    so the best column never decreases with x. Anchors, every SEGMENT-th pixel, are solved by bisection between their
//    neighbours' columns; the pixels between two anchors then search between the anchors' columns only. No row costs
//    more than a few times its length, whatever the map.
#ifndef CONTEXTRAST_LINES_H
#define CONTEXTRAST_LINES_H

#include <math.h>

#include "contextrast.h"

#if defined(__CUDACC__)
#define CONTEXTRAST_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#include <intrin.h>
#define CONTEXTRAST_HD __forceinline
#else
#define CONTEXTRAST_HD inline __attribute__((always_inline))  // so that it takes on the instruction set of its caller
#endif

namespace contextrast {

constexpr uint32_t NO_SEED =
    0x7FFF;  // "no seed in this column": above every distance, and a 16-bit number after adding 31
constexpr int32_t NO_SEED_SQ =
    1 << 29;  // above every squared distance (2 · 16383² < 2^29); any cost from here up means "no seed"
static_assert(2LL * (CONTEXTRAST_MAX_SIDE - 1) * (CONTEXTRAST_MAX_SIDE - 1) < NO_SEED_SQ,
              "a squared distance must stay below NO_SEED_SQ");

template <class T>
CONTEXTRAST_HD T lesser(T a, T b) {
  return b < a ? b : a;
}

template <class T>
CONTEXTRAST_HD T greater(T a, T b) {
  return a < b ? b : a;
}

// Of a word that is not 0.
CONTEXTRAST_HD int leading_zeros(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __clz(static_cast<int>(word));
#elif defined(_MSC_VER)
  unsigned long top;
  _BitScanReverse(&top, word);
  return 31 - static_cast<int>(top);
#else
  return __builtin_clz(word);
#endif
}

CONTEXTRAST_HD int trailing_zeros(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int>(word)) - 1;
#elif defined(_MSC_VER)
  unsigned long low;
  _BitScanForward(&low, word);
  return static_cast<int>(low);
#else
  return __builtin_ctz(word);
#endif
}

// ---- 1. Seeds

// A neighbour beyond the image border is given as `here` itself: the border is no edge.
template <class T>
CONTEXTRAST_HD bool is_edge(T here, T up, T down, T left, T right) {
  return (here >= T(0)) & ((here != up) | (here != down) | (here != left) | (here != right));
}

// ---- 2. Columns

// A carry packs two distances, NO_SEED where there is none: `above`, from the word's first row up to the nearest seed
// above the word (>= 1), and `below`, from its last row down to the nearest seed below it (>= 1). Outermost words have
// NO_SEED there; rows beyond H hold no bits.
CONTEXTRAST_HD uint32_t pack_carry(uint32_t above, uint32_t below) { return above | below << 16; }
CONTEXTRAST_HD uint32_t carry_above(uint32_t carry) { return carry & 0xFFFF; }
CONTEXTRAST_HD uint32_t carry_below(uint32_t carry) { return carry >> 16; }

// `above` of the next word down, `below` of the next word up.
CONTEXTRAST_HD uint32_t pass_down(uint32_t word, uint32_t above) {
  return word ? static_cast<uint32_t>(leading_zeros(word)) + 1 : lesser(above + 32, NO_SEED);
}

CONTEXTRAST_HD uint32_t pass_up(uint32_t word, uint32_t below) {
  return word ? static_cast<uint32_t>(trailing_zeros(word)) + 1 : lesser(below + 32, NO_SEED);
}

// Distance along the column from bit `row` (0..31) of the word to the nearest seed.
CONTEXTRAST_HD uint32_t column_distance(uint32_t word, int row, uint32_t carry) {
  const uint32_t upward = word << (31 - row), downward = word >> row;
  const uint32_t up =
      upward ? static_cast<uint32_t>(leading_zeros(upward)) : carry_above(carry) + static_cast<uint32_t>(row);
  const uint32_t down =
      downward ? static_cast<uint32_t>(trailing_zeros(downward)) : carry_below(carry) + static_cast<uint32_t>(31 - row);
  return lesser(lesser(up, down), NO_SEED);
}

// ---- 3. Rows. `parabolas` holds parabola(g(u), u) for each column u; ranges of columns include both ends.

CONTEXTRAST_HD int32_t parabola(uint32_t g, int u) {
  return (g >= NO_SEED ? NO_SEED_SQ : static_cast<int32_t>(g * g)) + u * u;
}

// (x-u)² + g(u)²
CONTEXTRAST_HD int32_t cost(const int32_t *parabolas, int x, int u) { return parabolas[u] + x * (x - 2 * u); }

// Step k of the window: best, after columns x-k and x+k. A column clamped to the ends only tests a nearer one again.
CONTEXTRAST_HD int32_t widen(const int32_t *parabolas, int first, int last, int x, int k, int32_t best) {
  const int32_t left = cost(parabolas, x, greater(x - k, first)), right = cost(parabolas, x, lesser(x + k, last));
  return lesser(best, lesser(left, right));
}

// After steps 1..k-1, no farther column can do better.
CONTEXTRAST_HD bool window_is_proof(int first, int last, int x, int k, int32_t best) {
  return k * k >= best || (x - k < first && x + k > last);
}

// The window, at most `steps` wide on either side. True if best is proven.
CONTEXTRAST_HD bool row_window(const int32_t *parabolas, int first, int last, int x, int steps, int32_t &best) {
  best = cost(parabolas, x, x);
  for (int k = 1; k <= steps; ++k) {
    if (window_is_proof(first, last, x, k, best)) return true;
    best = widen(parabolas, first, last, x, k, best);
  }
  return window_is_proof(first, last, x, steps + 1, best);
}

// Segment j holds the pixels first + j*size .. first + (j+1)*size - 1, up to last; it lies between anchors j and j+1,
// the last of which is `last`.
CONTEXTRAST_HD int segments(int first, int last, int size) { return (last - first) / size + 1; }
CONTEXTRAST_HD int anchor_column(int first, int last, int size, int j) { return lesser(first + j * size, last); }

// Bisection: solve anchor 0 over first..last, anchor n = segments() from there to last, then
//   for (step = first_step(n); step; step /= 2) for (j = step; j < n; j += 2 * step)
// anchor j between the columns of anchors j - step and min(j + step, n). The ranges of one step sum to the row's length
// + their number.
CONTEXTRAST_HD int first_step(int n) {
  int step = 1;
  while (2 * step < n) step *= 2;
  return n > 1 ? step : 0;
}

struct Candidate {
  int32_t cost;
  int32_t column;
};

// The best of columns first + lane, first + lane + lanes, ... <= last: a warp's share of an anchor. Cost INT32_MAX if
// there are none.
CONTEXTRAST_HD Candidate lane_candidate(const int32_t *parabolas, int x, int first, int last, int lane, int lanes) {
  Candidate best = {INT32_MAX, last};
  for (int u = first + lane; u <= last; u += lanes) {
    const int32_t here = cost(parabolas, x, u);
    if (here < best.cost) best = {here, u};
  }
  return best;
}

CONTEXTRAST_HD Candidate better(Candidate a, Candidate b) {
  return b.cost < a.cost || (b.cost == a.cost && b.column < a.column) ? b : a;
}

// The best cost of pixel x over the columns first..last.
CONTEXTRAST_HD int32_t least_cost(const int32_t *parabolas, int x, int first, int last) {
  int32_t best = INT32_MAX, linear = -2 * x * first;
  for (int u = first; u <= last; ++u, linear -= 2 * x) best = lesser(best, parabolas[u] + linear);
  return best + x * x;
}

// ---- What is written

CONTEXTRAST_HD int32_t squared_distance(int32_t best) { return best >= NO_SEED_SQ ? CONTEXTRAST_NO_EDGE : best; }

// The distance, rounded to float once.
CONTEXTRAST_HD float distance_of(int32_t squared) {
  return squared == CONTEXTRAST_NO_EDGE ? INFINITY : static_cast<float>(sqrt(static_cast<double>(squared)));
}

}  // namespace contextrast
#endif
