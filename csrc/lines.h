// The lines of an exact Euclidean distance transform: what edt.cpp, edt.cu and volume.cu compute for one pixel, one
// column and one line.
//
// 1. Sites, one bit a pixel: the pixels to which distances are measured, which are zeros of a mask or edge pixels. An
//    edge pixel of class n is a pixel of n with a neighbour inside the image that is not in n. Only edges need the
//    classes: on every monotone path from p to a site q outside p's region, the last pixel inside the region is an edge
//    pixel of p's class, and it is nearer to p than q. So the site nearest to p is always an edge pixel of p's class,
//    and one binary transform serves all classes.
// 2. Columns, along the first axis that is longer than 1. 32 pixels of a column are a word; a carry holds the distances
//    to the nearest site above and below the word. The distance along the column is then a count of leading and one of
//    trailing zeros.
// 3. Lines, along each other axis. With g(u) the least cost within the line's pixel u over the axes before,
//    cost(x) = min over u of g(u) + apart(x - u). A window around x settles it as soon as apart(k) >= cost, which takes
//    about as many steps as the distance. Where that is long: apart is convex, so for x1 < x2 and u1 < u2
//    cost(x1,u1) + cost(x2,u2) < cost(x1,u2) + cost(x2,u1) (Monge), and the best u never decreases with x. Pivots,
//    every so many pixels, are solved by bisection between their neighbours' best; the pixels between two pivots then
//    search between the pivots' best only. No line costs more than a few times its length, whatever the map.
//
// Sampling. cost is rounded to double after each operation. Rounding keeps the order of numbers, so a minimum may be
// taken axis by axis, and each comparison may be one of rounded costs: the result is the minimum over all sites, to the
// bit. The Monge inequality holds with a margin of 2·side² or more, for rounded costs too as long as their last place
// is below it (Metric::search).
#ifndef CONTEXTRAST_LINES_H
#define CONTEXTRAST_LINES_H

#include <math.h>

#include "contextrast.h"

#if defined(__CUDACC__)
#define CONTEXTRAST_HD __host__ __device__ __forceinline__
#else
#define CONTEXTRAST_HD inline __attribute__((always_inline))  // so that it takes on the instruction set of its caller
#endif

namespace contextrast {

// No site in this column: above every distance, and still a 16-bit number after adding 31.
constexpr uint32_t NO_SITE = 0x7FFF;
// Above every squared distance in a map (2 · 16383² < 2^29); any cost from here up means "no site".
constexpr int32_t NO_SITE_SQ = 1 << 29;
static_assert(2LL * (CONTEXTRAST_MAX_SIDE - 1) * (CONTEXTRAST_MAX_SIDE - 1) < NO_SITE_SQ,
              "a squared distance must stay below NO_SITE_SQ");

template <class T>
CONTEXTRAST_HD T lesser(T a, T b) {
  return b < a ? b : a;
}

template <class T>
CONTEXTRAST_HD T greater(T a, T b) {
  return a < b ? b : a;
}

// Undefined for 0.
CONTEXTRAST_HD int leading_zeros(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __clz(static_cast<int>(word));
#else
  return __builtin_clz(word);
#endif
}

CONTEXTRAST_HD int trailing_zeros(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int>(word)) - 1;
#else
  return __builtin_ctz(word);
#endif
}

// ---- 1. Sites

// A neighbour beyond the image border is given as `here` itself: the border is no edge.
template <class T, class... Neighbours>
CONTEXTRAST_HD bool is_edge(T here, Neighbours... neighbours) {
  return (here >= T(0)) & ((here != neighbours) | ...);
}

// ---- 2. Columns

// A carry packs two distances, NO_SITE where there is none: `above`, from the word's first row up to the nearest site
// above the word (>= 1), and `below`, from its last row down to the nearest site below it (>= 1). Outermost words have
// NO_SITE there; rows beyond H hold no bits.
CONTEXTRAST_HD uint32_t pack_carry(uint32_t above, uint32_t below) { return above | below << 16; }
CONTEXTRAST_HD uint32_t carry_above(uint32_t carry) { return carry & 0xFFFF; }
CONTEXTRAST_HD uint32_t carry_below(uint32_t carry) { return carry >> 16; }

// `above` of the next word down, `below` of the next word up.
CONTEXTRAST_HD uint32_t pass_down(uint32_t word, uint32_t above) {
  return word ? static_cast<uint32_t>(leading_zeros(word)) + 1 : lesser(above + 32, NO_SITE);
}

CONTEXTRAST_HD uint32_t pass_up(uint32_t word, uint32_t below) {
  return word ? static_cast<uint32_t>(trailing_zeros(word)) + 1 : lesser(below + 32, NO_SITE);
}

// Distance along the column from bit `row` (0..31) of the word to the nearest site.
CONTEXTRAST_HD uint32_t column_distance(uint32_t word, int row, uint32_t carry) {
  const uint32_t upward = word << (31 - row), downward = word >> row;
  const uint32_t up =
      upward ? static_cast<uint32_t>(leading_zeros(upward)) : carry_above(carry) + static_cast<uint32_t>(row);
  const uint32_t down =
      downward ? static_cast<uint32_t>(trailing_zeros(downward)) : carry_below(carry) + static_cast<uint32_t>(31 - row);
  return lesser(lesser(up, down), NO_SITE);
}

// Where the nearest site of the column is, relative to bit `row`: the one above of two that are equally near. NO_OFFSET
// if there is none.
constexpr int32_t NO_OFFSET = INT32_MAX;

CONTEXTRAST_HD int32_t column_offset(uint32_t word, int row, uint32_t carry) {
  const uint32_t upward = word << (31 - row), downward = word >> row;
  const uint32_t up =
      upward ? static_cast<uint32_t>(leading_zeros(upward)) : carry_above(carry) + static_cast<uint32_t>(row);
  const uint32_t down =
      downward ? static_cast<uint32_t>(trailing_zeros(downward)) : carry_below(carry) + static_cast<uint32_t>(31 - row);
  if (lesser(up, down) >= NO_SITE) return NO_OFFSET;
  return up <= down ? -static_cast<int32_t>(up) : static_cast<int32_t>(down);
}

// ---- 3. Lines with any sampling

// What a cost is made of. If every side is an integer multiple of one power of two and the costs stay small, costs are
// integers, in units of `unit`. Otherwise they are doubles.
struct Metric {
  double side[3];     // along z, y, x
  int32_t weight[3];  // side² in integer units
  double unit;        // the cost of 1 in integer units
  int32_t integral;   // 1: costs are integers; 0: they are doubles
  int32_t search[3];  // along each axis: 1 if the best u never decreases, also in rounded costs; 0: look at every u
  int32_t largest;    // the largest cost between two pixels of the image in integer units
};

constexpr int32_t NO_COST = 1 << 30;  // no site: above every integer cost, and no overflow when such a cost is added

template <class Cost>
struct Costs;

template <>
struct Costs<int32_t> {
  static constexpr int32_t none = NO_COST;
  static CONTEXTRAST_HD int32_t side(const Metric &metric, int axis) { return metric.weight[axis]; }
  static CONTEXTRAST_HD int32_t apart(int32_t weight, int steps) { return weight * steps * steps; }
  static CONTEXTRAST_HD int32_t sum(int32_t a, int32_t b) { return a + b; }
};

template <>
struct Costs<double> {
  static constexpr double none = INFINITY;
  static CONTEXTRAST_HD double side(const Metric &metric, int axis) { return metric.side[axis]; }
#if defined(__CUDA_ARCH__)
  static CONTEXTRAST_HD double apart(double side, int steps) {
    const double length = __dmul_rn(side, static_cast<double>(steps));
    return __dmul_rn(length, length);
  }
  static CONTEXTRAST_HD double sum(double a, double b) { return __dadd_rn(a, b); }
#else  // compiled without contraction to fused multiply-adds
  static CONTEXTRAST_HD double apart(double side, int steps) {
    const double length = side * steps;
    return length * length;
  }
  static CONTEXTRAST_HD double sum(double a, double b) { return a + b; }
#endif
};

// A candidate for the best pixel of a line. `key` orders equals: its place in the line (for pivots), or the number of
// its site in the image's memory (for results).
template <class Cost>
struct Found {
  Cost cost;
  int32_t key;
};

template <class Cost>
CONTEXTRAST_HD Found<Cost> better(Found<Cost> a, Found<Cost> b) {
  return b.cost < a.cost || (b.cost == a.cost && b.key < a.key) ? b : a;
}

// The best of the pixels first + lane, first + lane + lanes, ... <= last for pixel x. keys null: places are the keys.
// A pivot takes the first of equals as its best: then the range between two pivots' best has every pixel that is
// best for one between them.
template <class Cost>
CONTEXTRAST_HD Found<Cost> search(const Cost *costs, const int32_t *keys, Cost side, int x, int first, int last,
                                  int lane, int lanes) {
  Found<Cost> best = {Costs<Cost>::none, INT32_MAX};
  for (int u = first + lane; u <= last; u += lanes)
    best = better(best, {Costs<Cost>::sum(costs[u], Costs<Cost>::apart(side, x - u)), keys ? keys[u] : u});
  return best;
}

// The result from a cost of the last axis.
CONTEXTRAST_HD bool has_site(int32_t cost) { return cost < NO_COST; }
CONTEXTRAST_HD bool has_site(double cost) { return cost < static_cast<double>(INFINITY); }

CONTEXTRAST_HD double in_pixels_squared(int32_t cost, const Metric &metric) {  // exact: unit is a power of two
  return has_site(cost) ? cost * metric.unit : static_cast<double>(INFINITY);
}
CONTEXTRAST_HD double in_pixels_squared(double cost, const Metric &) { return cost; }

template <class Cost>
CONTEXTRAST_HD float in_pixels(Cost cost, const Metric &metric) {  // sqrt, rounded to float once
  return static_cast<float>(sqrt(in_pixels_squared(cost, metric)));
}

// ---- 3. Rows of square pixels, in 32-bit integers. `parabolas` holds parabola(g(u), u) for each column u. Ranges of
// columns include both ends.

CONTEXTRAST_HD int32_t parabola(uint32_t g, int u) {
  return (g >= NO_SITE ? NO_SITE_SQ : static_cast<int32_t>(g * g)) + u * u;
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

// Segment j holds the pixels first + j*size .. first + (j+1)*size - 1, up to last; it lies between pivots j and j+1,
// the last of which is `last`.
CONTEXTRAST_HD int segments(int first, int last, int size) { return (last - first) / size + 1; }
CONTEXTRAST_HD int pivot_column(int first, int last, int size, int j) { return lesser(first + j * size, last); }

// Bisection: solve pivot 0 over first..last, pivot n = segments() from there to last, then
//   for (step = first_step(n); step; step /= 2) for (j = step; j < n; j += 2 * step)
// pivot j between the columns of pivots j - step and min(j + step, n). The ranges of one step sum to the row's length
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

// The best of columns first + lane, first + lane + lanes, ... <= last: a warp's share of a pivot. Cost INT32_MAX if
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

// ---- Results

CONTEXTRAST_HD int32_t squared_distance(int32_t best) { return best >= NO_SITE_SQ ? CONTEXTRAST_NO_EDGE : best; }

// The distance, rounded to float once.
CONTEXTRAST_HD float distance_of(int32_t squared) {
  return squared == CONTEXTRAST_NO_EDGE ? INFINITY : static_cast<float>(sqrt(static_cast<double>(squared)));
}

}  // namespace contextrast
#endif
