// The search along one line or several abreast on the CPU: a window settles a block of neighbouring pixels or leaves it
// open. Open blocks are solved by bisection between pivots (lines.h, step 3).
#ifndef CONTEXTRAST_SEARCH_H
#define CONTEXTRAST_SEARCH_H

#include <limits>

#include "host.h"
#include "vectors.h"

namespace contextrast {
namespace {

// The steps of a window; WINDOW_BESIDE_OPEN if the block before is open. If LONG_WINDOW steps are certain to settle the
// block, the window goes on to them.
constexpr int WINDOW = 8, WINDOW_BESIDE_OPEN = 2;
constexpr int LONG_WINDOW = 16;
constexpr int NARROW = 16;                        // pixels between which no pivot is worth its search
constexpr int BLOCKS = CONTEXTRAST_MAX_SIDE / 8;  // the most blocks of a line
static_assert(MARGIN >= LONG_WINDOW + 16, "what a block of 64 bytes reads beside its line");

// apart(steps) along one axis for -steps..steps, steps being the axis and a block more.
template <class Cost>
struct Apart {
  Cost *zero;

  static int64_t reach(int size) { return size + MARGIN; }
  Apart(Scratch &scratch, int size) {
    Cost *start = scratch.take<Cost>(2 * reach(size) + 1);
    zero = start ? start + reach(size) : nullptr;
  }
  void fill(Cost side, int size) const {
    for (int64_t steps = 0; steps <= reach(size); ++steps)
      zero[steps] = zero[-steps] = Costs<Cost>::apart(side, static_cast<int>(steps));
  }
};

// A line of a plane, or several abreast: costs and keys of the axes before, with MARGIN pixels without a site on either
// side; and results. `best` starts as the costs. It is negative where no distance is wanted, and stays so.
template <class Cost>
struct Line {
  Cost *costs, *best;
  int32_t *keys, *best_keys;

  Line(Scratch &scratch, int64_t size, int64_t abreast, bool with_keys) {
    const int64_t count = size > 0 ? (size + 2 * MARGIN) * abreast : 0, margin = MARGIN * abreast;
    costs = scratch.take<Cost>(count);
    best = scratch.take<Cost>(count);
    keys = with_keys ? scratch.take<int32_t>(count) : nullptr;
    best_keys = with_keys ? scratch.take<int32_t>(count) : nullptr;
    if (!costs || size == 0) return;
    for (int64_t i = 0; i < margin; ++i) costs[i] = costs[count - 1 - i] = Costs<Cost>::none;
    for (int64_t i = 0; with_keys && i < margin; ++i) keys[i] = keys[count - 1 - i] = INT32_MAX;
    costs += margin;
    if (with_keys) keys += margin;
  }

  CONTEXTRAST_HD Line from(int64_t start) const {
    Line line = *this;
    line.costs += start;
    line.best += start;
    if (keys) line.keys += start, line.best_keys += start;
    return line;
  }
};

// Whether pixels at the cost `next` away could still improve a block.
template <bool KEYS, class Cost>
CONTEXTRAST_HD bool is_open_at(const Cost *best, Cost next) {
  return Best<KEYS, Cost>{Block<Cost>::at(best), {}}.is_open(next);
}

// Tries for one block the `steps` pixels to either side, which lie `step` elements apart. True if the block is settled.
template <bool KEYS, class Cost>
CONTEXTRAST_HD bool window(const Cost *costs, const int32_t *keys, int64_t step, const Cost *apart, int steps,
                           Cost *best, int32_t *best_keys) {
  Best<KEYS, Cost> found{};
  found.costs = Block<Cost>::at(best);
  if (!found.is_open(apart[1])) return true;
  if constexpr (KEYS) found.keys = Keys<Cost>::at(best_keys);
  bool is_open = true;
  for (int k = 1; k <= steps && is_open; ++k) {
    const Block<Cost> before = Block<Cost>::at(costs - k * step), after = Block<Cost>::at(costs + k * step);
    if constexpr (KEYS) {
      found.try_candidate(before + apart[k], Keys<Cost>::at(keys - k * step));
      found.try_candidate(after + apart[k], Keys<Cost>::at(keys + k * step));
    } else {
      found.try_candidate(least(before, after) + apart[k], Keys<Cost>{});
    }
    if (k % 2 == 0) is_open = found.is_open(apart[k + 1]);
    if (k == steps && is_open && !found.is_open(apart[LONG_WINDOW + 1])) steps = LONG_WINDOW;
  }
  found.costs.put(best);
  if constexpr (KEYS) found.keys.put(best_keys);
  return !is_open;
}

// Every lane gets the least place among the lanes of least cost.
template <int S = 0, class V, class Places>
CONTEXTRAST_HD Places place_of_least(V low, Places place) {
  constexpr int COUNT = sizeof(V) / sizeof(V{}[0]);
  constexpr int STEP = S ? S : COUNT / 2;
  Places turned;
  for (int i = 0; i < COUNT; ++i) turned[i] = i ^ STEP;
  const V other = __builtin_shuffle(low, turned);
  const Places other_place = __builtin_shuffle(place, turned);
  const auto is_better = (other < low) | ((other == low) & (other_place < place));
  place = is_better ? other_place : place;
  if constexpr (STEP == 1)
    return place;
  else
    return place_of_least<STEP / 2>(least(low, other), place);
}

// The first pixel of first..last that is best for pixel x. If x lies beyond the line, a site may cost more than `none`.
// Then the best pixel may be one without a site, and it still bounds the best pixels of the line. Pixels beyond `last`
// are looked at too, and none of them is better for a pixel of the line.
template <class Cost>
CONTEXTRAST_HD int first_best(const Cost *costs, const Cost *apart, int x, int first, int last) {
  using V = typename Vectors<Cost>::Costs;
  using Places = typename Vectors<Cost>::Places;
  constexpr int HALF = LANES<Cost> / 2;
  V low = V{} + std::numeric_limits<Cost>::max(), low_b = low;
  Places chunk{}, chunk_b{}, here = Places{} + first;
  const Cost *to = costs + last, *away = apart + (first - x);
  for (const Cost *from = costs + first; from <= to; from += 2 * HALF, away += 2 * HALF, here += 2 * HALF) {
    const V a = load<V>(from) + load<V>(away), b = load<V>(from + HALF) + load<V>(away + HALF);
    chunk = a < low ? here : chunk;
    chunk_b = b < low_b ? here + HALF : chunk_b;
    low = least(low, a);
    low_b = least(low_b, b);
  }
  const auto is_b = (low_b < low) | ((low_b == low) & (chunk_b < chunk));
  low = is_b ? low_b : low;
  chunk = (is_b ? chunk_b : chunk) + Vectors<Cost>::ramp();
  const Places place = place_of_least(low, chunk);
  return lesser(static_cast<int>(place[0]), last);
}

// best = the least cost of the block's pixels x.. over the pixels first..last of the line, where a distance is wanted.
template <bool KEYS, class Cost>
CONTEXTRAST_HD void sweep(const Cost *costs, const int32_t *keys, const Cost *apart, int x, int first, int last,
                          Cost *best, int32_t *best_keys) {
  Best<KEYS, Cost> found{};
  found.costs = Block<Cost>::of(Costs<Cost>::none);
  if constexpr (KEYS) found.keys = Keys<Cost>::of(INT32_MAX);
  for (int u = first; u <= last; ++u)
    found.try_candidate(Block<Cost>::at(apart + (x - u)) + costs[u], KEYS ? Keys<Cost>::of(keys[u]) : Keys<Cost>{});
  const Block<Cost> old = Block<Cost>::at(best);
  const Cost none = 0;
  Block<Cost>{old.a < none ? old.a : found.costs.a, old.b < none ? old.b : found.costs.b}.put(best);
  if constexpr (KEYS) found.keys.put(best_keys);
}

// What is left of a block after its window.
enum State : uint8_t { WITHOUT_PENDING, SETTLED, OPEN };

// Solves the open blocks of one run of blocks with pending pixels, from..end-1. The pixels beside the run are the
// farthest that matter to it. Pivots, which are the first pixels of blocks, are solved by bisection, then each block
// between its own pivot's best and the next one's.
template <bool KEYS, class Cost>
CONTEXTRAST_HD void search_run(const Line<Cost> &line, const Cost *apart, int size, bool bisects,
                               const uint8_t *states, int from, int end) {
  constexpr int lanes = LANES<Cost>;
  int lows[BLOCKS + 1], highs[BLOCKS + 1];  // bounds of each pivot's best
  int to = end - 1, first = greater(from * lanes - 1, 0), last = lesser(end * lanes, size - 1);
  while (from <= to && states[from] != OPEN) ++from;
  if (from > to) return;
  while (states[to] != OPEN) --to;
  while (first <= last && !has_site(line.costs[first])) ++first;
  if (first > last) return;
  while (!has_site(line.costs[last])) --last;

  const int count = to - from + 1;
  if (bisects) {
    lows[0] = first_best(line.costs, apart, from * lanes, first, last);
    highs[count] = first_best(line.costs, apart, (to + 1) * lanes, lows[0], last);
    for (int step = first_step(count); step; step /= 2)
      for (int j = step; j < count; j += 2 * step) {
        lows[j] = lows[j - step];
        highs[j] = highs[lesser(j + step, count)];
        if (highs[j] - lows[j] >= NARROW)
          lows[j] = highs[j] = first_best(line.costs, apart, (from + j) * lanes, lows[j], highs[j]);
      }
  }
  for (int j = 0; j < count; ++j) {
    if (states[from + j] != OPEN) continue;
    const int x = (from + j) * lanes;
    sweep<KEYS>(line.costs, line.keys, apart, x, bisects ? lows[j] : first, bisects ? highs[j + 1] : last,
                line.best + x, KEYS ? line.best_keys + x : nullptr);
  }
}

// Solves the open blocks of a line.
template <bool KEYS, class Cost>
CONTEXTRAST_HD void search_line(const Line<Cost> &line, const Cost *apart, int size, bool bisects,
                                const uint8_t *states) {
  const int blocks = (size - 1) / LANES<Cost> + 1;
  for (int end = 0; end < blocks;) {
    int from = end;
    while (from < blocks && states[from] == WITHOUT_PENDING) ++from;
    for (end = from; end < blocks && states[end] != WITHOUT_PENDING;) ++end;
    if (from < end) search_run<KEYS>(line, apart, size, bisects, states, from, end);
  }
}

}  // namespace
}  // namespace contextrast
#endif
