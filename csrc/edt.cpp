// edge_distance and distance_transform on the CPU, for lines, maps and volumes.
//   1. mark: the seeds, and for edge_distance the pixels whose distance is wanted, a bit each. A word has 32 pixels of a
//      column, which is a line along the first axis that is longer than 1.
//   2. carry: the nearest seeds above and below each word.
//   3. solve: plane after plane across the columns, first along y (in volumes), then along x. A block of 64 bytes of
//      costs, of neighbours along x, is settled by a window; the blocks that it leaves open are searched line by line.
// Only pixels that are wanted and no seed, the far ones, are searched for; blocks without one are passed over. Along any
// axis the neighbours of a run of far pixels are seeds, or the image ends there, so that no pixel beyond them matters.
#include <string.h>

#include <limits>

#include "host.h"
#include "lines.h"

namespace contextrast {
namespace {

constexpr int BAND = 32;
constexpr int MARKED = 4;                          // rows of a band that are marked together
constexpr int STRIP = 64;                          // columns of a plane that are searched along y together
constexpr int WINDOW = 8, WINDOW_BESIDE_OPEN = 2;  // steps before a block is left to the search,
constexpr int LONG_WINDOW = 16;                    // unless no more than so many are known to be enough
constexpr int NARROW = 16;                         // pixels between which no anchor is worth its search
constexpr int BLOCKS = CONTEXTRAST_MAX_SIDE / 8;   // the most blocks of a line
constexpr int TASK_PIXELS = 1 << 14;
static_assert(MARGIN >= LONG_WINDOW + 16, "what a block of 64 bytes reads beside its line");

// The volume without axes of one pixel: (columns' length, y, x); a map is (H, 1, W), a line is (1, 1, W). Neither a sum
// of costs nor an order in memory changes with it.
struct Volume {
  const void *data;
  int32_t type;
  int64_t batch, stride_batch;
  int size[3];
  int64_t stride[3];
  Metric metric;
  ContextrastDistance wanted;

  Volume(const ContextrastVolume &volume, const ContextrastDistance &asked)
      : data(volume.data), type(volume.type), batch(volume.batch), stride_batch(volume.stride_batch), wanted(asked) {
    metric = metric_of(volume, asked);
    for (int axis = 0; axis < 3; ++axis) {
      size[axis] = static_cast<int>(volume.size[axis]);
      stride[axis] = volume.stride[axis];
    }
    if (size[2] == 1) exchange(1, 2);
    if (size[2] == 1) exchange(0, 2);
    if (size[0] == 1) exchange(0, 1);
  }

  int64_t plane() const { return static_cast<int64_t>(size[1]) * size[2]; }
  int64_t image() const { return size[0] * plane(); }
  int64_t bands() const { return (size[0] + BAND - 1) / BAND; }
  bool keys() const { return wanted.nearest[0] || wanted.nearest[1] || wanted.nearest[2]; }

 private:
  template <class T>
  static void exchange(T (&values)[3], int a, int b) {
    const T value = values[a];
    values[a] = values[b];
    values[b] = value;
  }
  void exchange(int a, int b) {
    exchange(size, a, b);
    exchange(stride, a, b);
    exchange(metric.side, a, b);
    exchange(metric.weight, a, b);
    exchange(metric.search, a, b);
    exchange(wanted.nearest, a, b);
  }
};

// (B, bands, y, x) each. Where there is one band, no carries. `far` is (B, bands, y, groups of eight along x): a bit is
// set where one of the eight pixels is far.
struct Words {
  uint32_t *seeds, *carries = nullptr, *wanted = nullptr, *far;

  Words(Scratch &scratch, const Volume &volume, bool edges) {
    const int64_t count = volume.batch * volume.bands() * volume.plane() + 8;  // rows are read by eight words
    seeds = scratch.take<uint32_t>(count);
    if (volume.bands() > 1) carries = scratch.take<uint32_t>(count);
    if (edges) wanted = scratch.take<uint32_t>(count);
    far = scratch.take<uint32_t>(volume.batch * volume.bands() * volume.size[1] * groups(volume.size[2]));
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

// One row, whose pixels lie `step` elements apart. Bits that `counts` leaves out make no pixel nonzero.
template <class T>
CONTEXTRAST_HD void mark_zeros(const T *__restrict here, int64_t step, int width, T counts, int bit,
                               uint32_t *__restrict seeds) {
  for (int64_t x = 0; x < width; ++x) seeds[x] |= static_cast<uint32_t>((here[x * step] & counts) == 0) << bit;
}

// How far the neighbours of a pixel lie in memory, 0 beyond a border of the image. For several rows of a band at once,
// `up` is the first row's and `down` is the last row's.
struct Neighbours {
  int64_t up, down, above, below;
};

// One pixel of each of ROWS rows, `across` elements apart. Rows of maps are not BESIDE others.
template <int ROWS, bool BESIDE, class T>
CONTEXTRAST_HD void mark_edge(const T *here, int64_t across, const Neighbours &to, int64_t left, int64_t right,
                              bool has_sign, int bit, uint32_t &seeds, uint32_t &wanted) {
  uint32_t own_seeds = 0, own_wanted = 0;
  for (int row = 0; row < ROWS; ++row, here += across) {
    const T own = *here, up = here[row == 0 ? to.up : -across], down = here[row == ROWS - 1 ? to.down : across];
    const bool is_wanted = !has_sign | (own >= T(0));
    auto differing = (own ^ up) | (own ^ down) | (own ^ here[left]) | (own ^ here[right]);
    if constexpr (BESIDE) differing |= (own ^ here[to.above]) | (own ^ here[to.below]);
    own_seeds |= static_cast<uint32_t>(is_wanted & (differing != 0)) << row;
    own_wanted |= static_cast<uint32_t>(is_wanted) << row;
  }
  seeds |= own_seeds << bit;
  wanted |= own_wanted << bit;
}

template <int ROWS, bool BESIDE, class T>
CONTEXTRAST_HD void mark_edges(const T *__restrict here, int64_t across, int64_t step, const Neighbours &to, int width,
                               bool has_sign, int bit, uint32_t *__restrict seeds, uint32_t *__restrict wanted) {
  const int64_t last = width - 1;
  for (int64_t x = 1; x < last; ++x)
    mark_edge<ROWS, BESIDE>(here + x * step, across, to, -step, step, has_sign, bit, seeds[x], wanted[x]);
  for (const int64_t x : {int64_t(0), last})
    mark_edge<ROWS, BESIDE>(here + x * step, across, to, x > 0 ? -step : 0, x < last ? step : 0, has_sign, bit,
                            seeds[x], wanted[x]);
}

// Rows z..z+ROWS-1 of a band.
template <int ROWS, class T>
CONTEXTRAST_HD void mark_edges(const Volume &volume, bool has_sign, const T *here, int z, int y, int bit,
                               uint32_t *seeds, uint32_t *wanted) {
  const int width = volume.size[2];
  const int64_t across = volume.stride[0], along = volume.stride[1], step = volume.stride[2];
  const Neighbours to{z > 0 ? -across : 0, z + ROWS < volume.size[0] ? across : 0, y > 0 ? -along : 0,
                      y + 1 < volume.size[1] ? along : 0};
  if (step != 1)
    mark_edges<ROWS, true>(here, across, step, to, width, has_sign, bit, seeds, wanted);
  else if (volume.size[1] > 1)
    mark_edges<ROWS, true>(here, across, 1, to, width, has_sign, bit, seeds, wanted);
  else
    mark_edges<ROWS, false>(here, across, 1, to, width, has_sign, bit, seeds, wanted);
}

// The words of row y of one band, which starts at plane `top`.
template <class T>
CONTEXTRAST_CLONES void mark_words(const Volume &volume, const Meaning &meaning, const T *image, int top, int y,
                                   uint32_t *seeds, uint32_t *wanted, uint32_t *far) {
  const int width = volume.size[2];
  const int64_t across = volume.stride[0], along = volume.stride[1], step = volume.stride[2];
  const T counts = meaning.ignores_sign ? std::numeric_limits<T>::max() : T(-1);
  memset(seeds, 0, static_cast<size_t>(width) * sizeof *seeds);
  if (wanted) memset(wanted, 0, static_cast<size_t>(width) * sizeof *wanted);
  const int end = lesser(top + BAND, volume.size[0]);
  for (int z = top; z < end;) {
    const T *here = image + z * across + y * along;
    const int bit = z - top;
    if (wanted && z + MARKED <= end) {
      mark_edges<MARKED>(volume, meaning.has_sign, here, z, y, bit, seeds, wanted);
      z += MARKED;
      continue;
    }
    if (wanted)
      mark_edges<1>(volume, meaning.has_sign, here, z, y, bit, seeds, wanted);
    else if (step == 1)
      mark_zeros(here, 1, width, counts, bit, seeds);
    else
      mark_zeros(here, step, width, counts, bit, seeds);
    ++z;
  }
  for (int group = 0; group < Words::groups(width); ++group) {
    uint32_t found = 0;
    for (int x = 8 * group; x < lesser(8 * group + 8, width); ++x)
      found |= (wanted ? wanted[x] : ~uint32_t(0)) & ~seeds[x];
    far[group] = found;
  }
}

// ---- 2. Carry: columns first..last-1 of one image

CONTEXTRAST_CLONES void carry_columns(const uint32_t *seeds, uint32_t *carries, int64_t bands, int64_t plane,
                                      int64_t first, int64_t last) {
  for (int64_t x = first; x < last; ++x) carries[x] = pack_carry(NO_SEED, 0);
  for (int64_t band = 1; band < bands; ++band) {
    const uint32_t *word = seeds + (band - 1) * plane, *from = carries + (band - 1) * plane;
    uint32_t *to = carries + band * plane;
    for (int64_t x = first; x < last; ++x) to[x] = pack_carry(pass_down(word[x], carry_above(from[x])), 0);
  }
  for (int64_t x = first; x < last; ++x) carries[(bands - 1) * plane + x] |= pack_carry(0, NO_SEED);
  for (int64_t band = bands - 2; band >= 0; --band) {
    const uint32_t *word = seeds + (band + 1) * plane, *from = carries + (band + 1) * plane;
    uint32_t *to = carries + band * plane;
    for (int64_t x = first; x < last; ++x) to[x] |= pack_carry(0, pass_up(word[x], carry_below(from[x])));
  }
}

// ---- 3. Solve

// Eight 32-bit lanes, and a block of 64 bytes of costs. The compiler splits them where registers are shorter.
using Ints = int32_t __attribute__((vector_size(32), aligned(4), may_alias));
using Words8 = uint32_t __attribute__((vector_size(32), aligned(4), may_alias));
using Floats = float __attribute__((vector_size(32), aligned(4), may_alias));
using Doubles = double __attribute__((vector_size(32), aligned(8), may_alias));
using HalfInts = int32_t __attribute__((vector_size(16), aligned(4), may_alias));

template <class Cost>
struct Vectors;
template <>
struct Vectors<int32_t> {
  using Costs = Ints;
  using Keys = Ints;
  using Places = Ints;
  static CONTEXTRAST_HD Ints ramp() { return Ints{0, 1, 2, 3, 4, 5, 6, 7}; }
  static CONTEXTRAST_HD Ints narrow(Ints mask) { return mask; }
};
template <>
struct Vectors<double> {
  using Costs = Doubles;
  using Keys = HalfInts;
  using Places = int64_t __attribute__((vector_size(32), aligned(8), may_alias));
  static CONTEXTRAST_HD Places ramp() { return Places{0, 1, 2, 3}; }
  static CONTEXTRAST_HD HalfInts narrow(Places mask) { return __builtin_convertvector(mask, HalfInts); }
};

template <class Cost>
constexpr int LANES = 64 / sizeof(Cost);  // pixels of a block: two vectors

template <class V>
CONTEXTRAST_HD V least(V a, V b) {
  return a < b ? a : b;
}
template <class V>
CONTEXTRAST_HD V most(V a, V b) {
  return a > b ? a : b;
}
template <class V, class T>
CONTEXTRAST_HD V load(const T *from) {
  return *reinterpret_cast<const V *>(from);
}
template <class V, class T>
CONTEXTRAST_HD void store(V value, T *to) {
  *reinterpret_cast<V *>(to) = value;
}
CONTEXTRAST_HD bool any(Ints mask) {
  using Long = int64_t __attribute__((vector_size(32), may_alias));
  const Long all = reinterpret_cast<Long>(mask);
  return (all[0] | all[1] | all[2] | all[3]) != 0;
}
CONTEXTRAST_HD bool any(Vectors<double>::Places mask) { return any(reinterpret_cast<Ints>(mask)); }

// Stage by stage, exchanges the blocks of S lanes beside the diagonal: the square of vectors is transposed.
template <int S, class V>
CONTEXTRAST_HD void transpose(V (&rows)[sizeof(V) / sizeof(V{}[0])]) {
  constexpr int COUNT = sizeof(V) / sizeof(V{}[0]);
  using Lanes = decltype(V{} == V{});
  Lanes low, high;
  for (int i = 0; i < COUNT; ++i) {
    low[i] = i & S ? COUNT + i - S : i;
    high[i] = i & S ? COUNT + i : i + S;
  }
  for (int i = 0; i < COUNT; ++i) {
    if (i & S) continue;
    const V a = rows[i], b = rows[i + S];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + S] = __builtin_shuffle(a, b, high);
  }
  if constexpr (S > 1) transpose<S / 2>(rows);
}

template <class Cost>
struct Block {
  using V = typename Vectors<Cost>::Costs;
  static constexpr int HALF = LANES<Cost> / 2;
  V a, b;

  static CONTEXTRAST_HD Block of(Cost value) { return {V{} + value, V{} + value}; }
  static CONTEXTRAST_HD Block at(const Cost *from) { return {load<V>(from), load<V>(from + HALF)}; }
  CONTEXTRAST_HD void put(Cost *to) const {
    store(a, to);
    store(b, to + HALF);
  }
  CONTEXTRAST_HD Block operator+(Cost value) const { return {a + value, b + value}; }
};
template <class Cost>
CONTEXTRAST_HD Block<Cost> least(const Block<Cost> &x, const Block<Cost> &y) {
  return {least(x.a, y.a), least(x.b, y.b)};
}

template <class Cost>
struct Keys {
  using V = typename Vectors<Cost>::Keys;
  static constexpr int HALF = LANES<Cost> / 2;
  V a, b;

  static CONTEXTRAST_HD Keys of(int32_t value) { return {V{} + value, V{} + value}; }
  static CONTEXTRAST_HD Keys at(const int32_t *from) { return {load<V>(from), load<V>(from + HALF)}; }
  CONTEXTRAST_HD void put(int32_t *to) const {
    store(a, to);
    store(b, to + HALF);
  }
};

// What a block has found so far. `keys` stays unused without KEYS.
template <bool KEYS, class Cost>
struct Best {
  Block<Cost> costs;
  Keys<Cost> keys;

  CONTEXTRAST_HD void try_candidate(const Block<Cost> &other, const Keys<Cost> &other_keys) {
    if constexpr (KEYS) {
      const auto a = Vectors<Cost>::narrow(other.a < costs.a) |
                     (Vectors<Cost>::narrow(other.a == costs.a) & (other_keys.a < keys.a));
      const auto b = Vectors<Cost>::narrow(other.b < costs.b) |
                     (Vectors<Cost>::narrow(other.b == costs.b) & (other_keys.b < keys.b));
      keys.a = a ? other_keys.a : keys.a;
      keys.b = b ? other_keys.b : keys.b;
    }
    costs = least(costs, other);
  }

  // Whether a pixel at the cost `next` away could still improve the block: a seed there, or with keys one as near that
  // comes first.
  CONTEXTRAST_HD bool is_open(Cost next) const {
    const auto worst = most(costs.a, costs.b);
    if constexpr (KEYS)
      return any(worst >= next);
    else
      return any(worst > next);
  }
};

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

// A line of a plane, or several abreast: costs and keys of the axes before, with MARGIN pixels without a seed on either
// side; and results. `best` starts as the costs, and below 0 where no distance is wanted, which stays.
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

// The window of one block, `steps` pixels to either side, which lie `step` elements apart. True if the block is settled.
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

// The first pixel of first..last that is best for pixel x. What it looks at beyond `last` cannot be better.
template <class Cost>
CONTEXTRAST_HD int first_best(const Cost *costs, const Cost *apart, int x, int first, int last) {
  using V = typename Vectors<Cost>::Costs;
  using Places = typename Vectors<Cost>::Places;
  constexpr int HALF = LANES<Cost> / 2;
  V low = V{} + Costs<Cost>::none, low_b = low;
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
  return static_cast<int>(place[0]);
}

// best = the least cost of the block's pixels x.. over the pixels first..last of the line, where a distance is wanted.
template <bool KEYS, class Cost>
CONTEXTRAST_HD void sweep(const Cost *costs, const int32_t *keys, const Cost *apart, int x, int first, int last,
                          Cost *best, int32_t *best_keys) {
  Best<KEYS, Cost> found{Block<Cost>::of(Costs<Cost>::none), Keys<Cost>::of(INT32_MAX)};
  for (int u = first; u <= last; ++u)
    found.try_candidate(Block<Cost>::at(apart + (x - u)) + costs[u], KEYS ? Keys<Cost>::of(keys[u]) : Keys<Cost>{});
  const Block<Cost> old = Block<Cost>::at(best);
  const Cost none = 0;
  Block<Cost>{old.a < none ? old.a : found.costs.a, old.b < none ? old.b : found.costs.b}.put(best);
  if constexpr (KEYS) found.keys.put(best_keys);
}

// What the window leaves of a block.
enum State : uint8_t { WITHOUT_FAR, SETTLED, OPEN };

// Solves the open blocks of a line, run after run of blocks with far pixels. The pixels beside a run are the farthest
// that matter to it. Anchors, which are the first pixels of blocks, are solved by bisection, then each block between
// its own anchor's best and the next one's.
template <bool KEYS, class Cost>
CONTEXTRAST_HD void search_line(const Line<Cost> &line, const Cost *apart, int size, bool bisects,
                                const uint8_t *states) {
  constexpr int lanes = LANES<Cost>;
  const int blocks = (size - 1) / lanes + 1;
  int lows[BLOCKS + 1], highs[BLOCKS + 1];  // bounds of each anchor's best
  for (int end = 0; end < blocks;) {
    while (end < blocks && states[end] == WITHOUT_FAR) ++end;
    int from = end;
    while (end < blocks && states[end] != WITHOUT_FAR) ++end;
    int to = end - 1, first = greater(from * lanes - 1, 0), last = lesser(end * lanes, size - 1);
    while (from <= to && states[from] != OPEN) ++from;
    if (from > to) continue;
    while (states[to] != OPEN) --to;
    while (first <= last && !has_seed(line.costs[first])) ++first;
    if (first > last) continue;
    while (!has_seed(line.costs[last])) --last;

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
}

// The bits of one row of a plane.
struct Row {
  const uint32_t *seeds, *carries, *wanted, *far;  // carries, wanted: null if there are none, or all are
  int bit;

  // Row `row` of all rows of words.
  CONTEXTRAST_HD Row(const Words &words, int64_t row, int width, int bit)
      : seeds(words.seeds + row * width),
        carries(words.carries ? words.carries + row * width : nullptr),
        wanted(words.wanted ? words.wanted + row * width : nullptr),
        far(words.far + row * Words::groups(width)),
        bit(bit) {}

  // Whether one of the pixels x..x+count-1 is far, or of those beyond up to a multiple of eight; x is one.
  CONTEXTRAST_HD bool any_far(int x, int count) const {
    uint32_t found = 0;
    for (int i = 0; i < count; i += 8) found |= far[(x + i) / 8];
    return found >> bit & 1;
  }

  // Which of eight pixels are wanted.
  CONTEXTRAST_HD Ints wanted_from(int x) const {
    return wanted ? reinterpret_cast<Ints>(load<Words8>(wanted + x) << (31 - bit)) < 0 : Ints{} - 1;
  }
};

// Eight pixels of a row: the steps to the nearest seed of their columns, and whether it is below (only of use if there
// is one). Leading and trailing zeros come from the exponents of floats.
struct Columns {
  Ints steps, is_below;

  CONTEXTRAST_HD Columns(const Row &row, int x) {
    const Words8 seeds = load<Words8>(row.seeds + x);
    const Words8 carries = row.carries ? load<Words8>(row.carries + x) : Words8{} + pack_carry(NO_SEED, NO_SEED);
    const Ints upward = reinterpret_cast<Ints>(seeds << (31 - row.bit));
    const Ints downward = reinterpret_cast<Ints>(seeds >> row.bit);
    // Without the bit behind the first, rounding to float cannot carry.
    const Ints first = upward & ~(upward >> 1);
    Ints up = 31 + 127 - (reinterpret_cast<Ints>(__builtin_convertvector(first, Floats)) >> 23);
    up = upward < 0 ? Ints{} : upward == 0 ? reinterpret_cast<Ints>(carries & 0xFFFF) + row.bit : up;
    const Words8 bits = reinterpret_cast<Words8>(downward);  // unsigned: every value has a negation
    const Ints only = reinterpret_cast<Ints>(bits & -bits);
    Ints down = (reinterpret_cast<Ints>(__builtin_convertvector(only, Floats)) >> 23 & 0xFF) - 127;
    down = downward == 0 ? reinterpret_cast<Ints>(carries >> 16) + (31 - row.bit) : down;
    is_below = down < up;
    steps = least(up, down);
  }
};

CONTEXTRAST_HD void put_costs(Ints steps, Ints has_cost, Ints is_wanted, int32_t weight, int32_t *costs,
                              int32_t *best) {
  // Unsigned: beyond the row's end and where nothing is near, steps are any number, and their square may wrap.
  const Words8 length = reinterpret_cast<Words8>(steps);
  const Words8 squared = length * length * static_cast<uint32_t>(weight);
  const Ints cost = has_cost ? reinterpret_cast<Ints>(squared) : Ints{} + NO_COST;
  store(is_wanted ? cost : Ints{} + NO_COST, costs);
  store(is_wanted ? cost : Ints{} + CONTEXTRAST_OUTSIDE, best);
}

CONTEXTRAST_HD void put_costs(Ints steps, Ints has_cost, Ints is_wanted, double side, double *costs, double *best) {
  using Places = Vectors<double>::Places;
  const HalfInts *all_steps = reinterpret_cast<const HalfInts *>(&steps);
  const HalfInts *all_costs = reinterpret_cast<const HalfInts *>(&has_cost);
  const HalfInts *all_wanted = reinterpret_cast<const HalfInts *>(&is_wanted);
  for (int half = 0; half < 2; ++half) {
    const Doubles length = __builtin_convertvector(all_steps[half], Doubles) * side, none = Doubles{} + INFINITY;
    const Doubles cost = __builtin_convertvector(all_costs[half], Places) ? length * length : none;
    const Places wanted = __builtin_convertvector(all_wanted[half], Places);
    store(wanted ? cost : none, costs + 4 * half);
    store(wanted ? cost : Doubles{} + double(CONTEXTRAST_OUTSIDE), best + 4 * half);
  }
}

// Costs along the columns, at pixels x..x+7 of a row, whose pixel 0 has a number in its image.
template <bool KEYS, class Cost>
CONTEXTRAST_HD void read_columns(const Row &row, int x, Cost side, int32_t number, int32_t plane, Cost *costs,
                                 int32_t *keys, Cost *best, int32_t *best_keys) {
  const Ints is_wanted = row.wanted_from(x), key = Vectors<int32_t>::ramp() + (number + x);
  if (!row.any_far(x, 8)) {  // those that are wanted are seeds
    put_costs(Ints{}, Ints{} - 1, is_wanted, side, costs, best);
    if constexpr (KEYS) {
      store(key, keys);
      store(key, best_keys);
    }
    return;
  }
  const Columns columns(row, x);
  const Ints has_cost = columns.steps < int32_t(NO_SEED);
  put_costs(columns.steps, has_cost, is_wanted, side, costs, best);
  if constexpr (KEYS) {
    const Ints offset = (columns.is_below ? columns.steps : -columns.steps) * plane;
    const Ints found = has_cost ? key + offset : Ints{} + INT32_MAX;
    store(found, keys);
    store(found, best_keys);
  }
}

template <bool KEYS, class Cost>
CONTEXTRAST_HD void read_row(const Row &row, int x, int count, Cost side, int32_t number, int64_t plane, Cost *costs,
                             int32_t *keys, Cost *best, int32_t *best_keys) {
  for (int i = 0; i < count; i += 8)  // beyond the row are other words, or room
    read_columns<KEYS>(row, x + i, side, number, static_cast<int32_t>(plane), costs + i, KEYS ? keys + i : nullptr,
                       best + i, KEYS ? best_keys + i : nullptr);
  for (int i = count; i < count + LANES<int32_t>; ++i) {
    costs[i] = Costs<Cost>::none;
    best[i] = Cost(CONTEXTRAST_OUTSIDE);
    if constexpr (KEYS) keys[i] = best_keys[i] = INT32_MAX;
  }
}

// A worker's memory.
template <class Cost>
struct Work {
  int strip;      // columns of a plane at a time
  Cost *costs;    // of a plane, along the columns and y: only where there are several rows
  int32_t *keys;  // likewise
  Line<Cost> strips, columns, row;
  uint8_t *states, *block_states;  // (y), (columns of a block, blocks of a line)

  Work(Scratch &scratch, const Volume &volume)
      : strip(lesser(STRIP, (volume.size[2] + LANES<int32_t> - 1) / LANES<int32_t> * LANES<int32_t>)),
        costs(has_rows(volume) ? scratch.take<Cost>(volume.plane()) : nullptr),
        keys(has_rows(volume) && volume.keys() ? scratch.take<int32_t>(volume.plane()) : nullptr),
        strips(scratch, has_rows(volume) ? volume.size[1] : 0, pitch(), volume.keys()),
        columns(scratch, has_rows(volume) ? column_size(volume) * LANES<Cost> : 0, 1, volume.keys()),
        row(scratch, volume.size[2], 1, volume.keys()),
        states(scratch.take<uint8_t>(volume.size[1])),
        block_states(scratch.take<uint8_t>(int64_t(LANES<Cost>) * blocks(greater(volume.size[1], volume.size[2])))) {}

  int pitch() const { return strip + LANES<int32_t>; }
  static int64_t column_size(const Volume &volume) { return volume.size[1] + MARGIN; }
  static int blocks(int size) { return (size + LANES<Cost> - 1) / LANES<Cost>; }
  static bool has_rows(const Volume &volume) { return volume.size[1] > 1; }
};

// Reads a square of elements, whose rows lie `pitch` apart, and calls put(i, column i).
template <class V, class T, class Put>
CONTEXTRAST_HD void turn(const T *from, int64_t pitch, const Put &put) {
  constexpr int COUNT = sizeof(V) / sizeof(T);
  V square[COUNT];
  for (int i = 0; i < COUNT; ++i) square[i] = load<V>(from + i * pitch);
  transpose<COUNT / 2>(square);
  for (int i = 0; i < COUNT; ++i) put(i, square[i]);
}

// What the window leaves open in the columns lane..lane+LANES-1 of a strip.
template <bool KEYS, class Cost>
CONTEXTRAST_HD void search_columns(const Volume &volume, const Apart<Cost> &apart, const Work<Cost> &work, int lane) {
  using V = typename Vectors<Cost>::Costs;
  using K = typename Vectors<Cost>::Keys;
  using Places = typename Vectors<Cost>::Places;
  constexpr int lanes = LANES<Cost>, half = lanes / 2;
  const int height = volume.size[1], blocks = Work<Cost>::blocks(height);
  const int64_t pitch = work.pitch(), size = Work<Cost>::column_size(volume);
  const Cost settled = apart.zero[WINDOW_BESIDE_OPEN + 1], zero = 0;
  for (int part = 0; part < lanes; part += half) {
    const Line<Cost> from = work.strips.from(lane + part), to = work.columns.from(part * size);
    for (int y = 0; y < height; y += half) {
      turn<V>(from.costs + y * pitch, pitch, [&](int i, V column) { store(column, to.costs + i * size + y); });
      if constexpr (KEYS)
        turn<K>(from.keys + y * pitch, pitch, [&](int i, K column) { store(column, to.keys + i * size + y); });
    }
    for (int block = 0; block < blocks; ++block) {
      Places is_far{}, is_open{};
      for (int y = block * lanes; y < lesser(height, (block + 1) * lanes); ++y) {
        if (work.states[y] == WITHOUT_FAR) continue;
        const V best = load<V>(from.best + y * pitch);
        is_far |= best > zero;
        if (work.states[y] == OPEN) is_open |= best >= settled;
      }
      for (int i = 0; i < half; ++i)
        work.block_states[(part + i) * blocks + block] = is_open[i] ? OPEN : is_far[i] ? SETTLED : WITHOUT_FAR;
    }
  }
  for (int i = 0; i < lanes; ++i) {
    const Line<Cost> own = work.columns.from(i * size);
    for (int y = height; y < height + MARGIN; ++y) own.costs[y] = Costs<Cost>::none;
    for (int y = 0; y < height + lanes; ++y) own.best[y] = Costs<Cost>::none;
    search_line<KEYS>(own, apart.zero, height, volume.metric.search[1] != 0, work.block_states + i * blocks);
  }
  for (int part = 0; part < lanes; part += half) {
    const Line<Cost> from = work.columns.from(part * size), to = work.strips.from(lane + part);
    for (int block = 0; block < blocks; ++block) {
      Places is_open;
      for (int i = 0; i < half; ++i) is_open[i] = -(work.block_states[(part + i) * blocks + block] == OPEN);
      for (int y = block * lanes; y < lesser(height, (block + 1) * lanes); y += half) {
        Places replaced[half];
        turn<V>(from.best + y, size, [&](int i, V row) {
          const V old = load<V>(to.best + (y + i) * pitch);
          replaced[i] = is_open & (old >= zero);
          store(replaced[i] ? row : old, to.best + (y + i) * pitch);
        });
        if constexpr (KEYS)
          turn<K>(from.best_keys + y, size, [&](int i, K row) {
            const K old = load<K>(to.best_keys + (y + i) * pitch);
            store(Vectors<Cost>::narrow(replaced[i]) ? row : old, to.best_keys + (y + i) * pitch);
          });
      }
    }
  }
}

// The columns x..x+count-1 of a plane, abreast, along y: into work.costs and work.keys.
template <bool KEYS, class Cost>
CONTEXTRAST_HD void solve_strip(const Volume &volume, const Words &words, int64_t rows, int z, int x, int count,
                                const Apart<Cost> &apart, const Work<Cost> &work) {
  const int height = volume.size[1], width = volume.size[2];
  const int64_t pitch = work.pitch();
  const Cost side = Costs<Cost>::side(volume.metric, 0);
  const Line<Cost> &strips = work.strips;
  for (int y = 0; y < height; ++y) {
    const int64_t start = int64_t(y) * width, at = y * pitch;
    read_row<KEYS>(Row(words, rows + y, width, z % BAND), x, count, side,
                   static_cast<int32_t>(z * volume.plane() + start), volume.plane(), strips.costs + at,
                   KEYS ? strips.keys + at : nullptr, strips.best + at, KEYS ? strips.best_keys + at : nullptr);
  }
  for (int lane = 0; lane < count; lane += LANES<Cost>) {
    bool is_open = false, any_open = false;
    for (int y = 0; y < height; ++y) {
      const int64_t at = y * pitch + lane;
      const bool any_far = Row(words, rows + y, width, z % BAND).any_far(x + lane, LANES<Cost>);
      is_open = any_far && !window<KEYS>(strips.costs + at, KEYS ? strips.keys + at : nullptr, pitch, apart.zero,
                              is_open ? WINDOW_BESIDE_OPEN : WINDOW, strips.best + at,
                              KEYS ? strips.best_keys + at : nullptr);
      work.states[y] = is_open ? OPEN : any_far ? SETTLED : WITHOUT_FAR;
      any_open |= is_open;
    }
    if (any_open) search_columns<KEYS>(volume, apart, work, lane);
  }
  for (int y = 0; y < height; ++y) {
    const int64_t to = int64_t(y) * width + x, at = y * pitch;
    memcpy(work.costs + to, strips.best + at, static_cast<size_t>(count) * sizeof(Cost));
    if constexpr (KEYS) memcpy(work.keys + to, strips.best_keys + at, static_cast<size_t>(count) * sizeof(int32_t));
  }
}

// ---- What is written of one row, which starts at output element `at`.

CONTEXTRAST_HD int32_t quotient(int32_t number, int32_t divisor, double inverse) {  // number >= 0
  const int32_t guess = static_cast<int32_t>(number * inverse);
  const int64_t rest = number - int64_t(guess) * divisor;
  return rest < 0 ? guess - 1 : rest >= divisor ? guess + 1 : guess;
}

template <class Cost>
CONTEXTRAST_HD void write_nearest(const Volume &volume, const Cost *best, const int32_t *keys, int64_t at) {
  const int width = volume.size[2];
  const int32_t plane = static_cast<int32_t>(volume.plane());
  const double per_plane = 1.0 / plane, per_row = 1.0 / width;
  int32_t *const *nearest = volume.wanted.nearest;
  for (int x = 0; x < width; ++x) {
    const bool is_known = has_seed(best[x]);  // without a seed the key may be any number
    const int32_t key = is_known ? keys[x] : 0, none = is_known ? 0 : -1;
    const int32_t z = quotient(key, plane, per_plane), in_plane = key - z * plane;
    const int32_t y = quotient(in_plane, width, per_row);
    if (nearest[0]) nearest[0][at + x] = z | none;
    if (nearest[1]) nearest[1][at + x] = y | none;
    if (nearest[2]) nearest[2][at + x] = (in_plane - y * width) | none;
  }
}

constexpr int32_t EXACT_IN_FLOAT = 1 << 24;

CONTEXTRAST_HD void write_distances(const Metric &metric, const int32_t *best, int width, float *distance) {
  int32_t most = 0;
  for (int x = 0; x < width; ++x) most = greater(most, best[x]);
  const double unit_length = sqrt(metric.unit);  // exact: an even power of two
  if (most < EXACT_IN_FLOAT && unit_length > 1e-15 && unit_length < 1e15) {
    // A float's square root in float is what the double's becomes when it is rounded.
    const float length = static_cast<float>(unit_length);
    for (int x = 0; x < width; ++x)
      distance[x] = best[x] < 0 ? -1.0f : sqrtf(static_cast<float>(greater(best[x], 0))) * length;
  } else {
    for (int x = 0; x < width; ++x)
      distance[x] = best[x] < 0          ? -1.0f
                    : has_seed(best[x]) ? static_cast<float>(sqrt(static_cast<double>(best[x])) * unit_length)
                                         : INFINITY;
  }
}

CONTEXTRAST_HD void write_distances(const Metric &, const double *best, int width, float *distance) {
  for (int x = 0; x < width; ++x)
    distance[x] = best[x] < 0 ? -1.0f : static_cast<float>(sqrt(greater(best[x], 0.0)));
}

template <class Cost>
CONTEXTRAST_HD void write_row(const Volume &volume, const Cost *best, int64_t at) {
  const int width = volume.size[2];
  if (!volume.wanted.squared) {
    write_distances(volume.metric, best, width, static_cast<float *>(volume.wanted.distance) + at);
  } else if (volume.wanted.sampled) {
    double *const distance = static_cast<double *>(volume.wanted.distance) + at;
    for (int x = 0; x < width; ++x) distance[x] = best[x] < 0 ? -1.0 : in_pixels_squared(best[x], volume.metric);
  } else {
    int32_t *const distance = static_cast<int32_t *>(volume.wanted.distance) + at;
    for (int x = 0; x < width; ++x)
      distance[x] = has_seed(best[x]) ? static_cast<int32_t>(best[x]) : CONTEXTRAST_NO_EDGE;
  }
}

// The same of a row without far pixels.
template <class T>
CONTEXTRAST_HD void write_seeds(const Row &row, int width, T *distance) {
  const uint32_t *const wanted = row.wanted;
  const int bit = row.bit;
  for (int x = 0; x < width; ++x) distance[x] = !wanted || wanted[x] >> bit & 1 ? T(0) : T(CONTEXTRAST_OUTSIDE);
}

CONTEXTRAST_HD void write_seeds(const Volume &volume, const Row &row, int64_t at) {
  const ContextrastDistance &to = volume.wanted;
  if (!to.squared)
    write_seeds(row, volume.size[2], static_cast<float *>(to.distance) + at);
  else if (to.sampled)
    write_seeds(row, volume.size[2], static_cast<double *>(to.distance) + at);
  else
    write_seeds(row, volume.size[2], static_cast<int32_t *>(to.distance) + at);
}

// Planes first..last-1 of an image.
template <bool KEYS, class Cost>
CONTEXTRAST_CLONES void solve_planes(const Volume &volume, const Words &words, const Apart<Cost> &apart_y,
                                     const Apart<Cost> &apart_x, const Work<Cost> &work, int64_t image, int first,
                                     int last) {
  const int height = volume.size[1], width = volume.size[2];
  const Line<Cost> &line = work.row;
  for (int z = first; z < last; ++z) {
    const int64_t rows = (image * volume.bands() + z / BAND) * height;
    if (height > 1)
      for (int x = 0; x < width; x += work.strip)
        solve_strip<KEYS>(volume, words, rows, z, x, lesser(work.strip, width - x), apart_y, work);
    for (int y = 0; y < height; ++y) {
      const int64_t start = int64_t(y) * width;
      const int64_t at = image * volume.image() + z * volume.plane() + start;
      const Row row(words, rows + y, width, z % BAND);
      if (!KEYS && !row.any_far(0, width)) {
        write_seeds(volume, row, at);
        continue;
      }
      if (height > 1) {
        for (int x = 0; x < width; ++x) {
          const Cost cost = work.costs[start + x];
          line.costs[x] = cost < 0 ? Costs<Cost>::none : cost;
          line.best[x] = cost;
        }
        for (int x = width; x < width + LANES<int32_t>; ++x) line.best[x] = Cost(CONTEXTRAST_OUTSIDE);
        if constexpr (KEYS) {
          memcpy(line.keys, work.keys + start, static_cast<size_t>(width) * sizeof(int32_t));
          memcpy(line.best_keys, work.keys + start, static_cast<size_t>(width) * sizeof(int32_t));
        }
      } else {
        read_row<KEYS>(row, 0, width, Costs<Cost>::side(volume.metric, 0),
                       static_cast<int32_t>(z * volume.plane()), volume.plane(), line.costs, line.keys, line.best,
                       line.best_keys);
      }
      bool is_open = false, any_open = false;
      for (int x = 0, block = 0; x < width; x += LANES<Cost>, ++block) {
        const bool any_far = row.any_far(x, LANES<Cost>);
        is_open = any_far && !window<KEYS>(line.costs + x, KEYS ? line.keys + x : nullptr, 1, apart_x.zero,
                                is_open ? WINDOW_BESIDE_OPEN : WINDOW, line.best + x,
                                KEYS ? line.best_keys + x : nullptr);
        work.block_states[block] = is_open ? OPEN : any_far ? SETTLED : WITHOUT_FAR;
        any_open |= is_open;
      }
      if (any_open) search_line<KEYS>(line, apart_x.zero, width, volume.metric.search[2] != 0, work.block_states);
      write_row(volume, line.best, at);
      if constexpr (KEYS) write_nearest(volume, line.best, line.best_keys, at);
    }
  }
}

// ---- The three passes

// Workers of the last pass: each has a plane of costs, all of which together are to take no more than the output.
int workers(const Volume &volume, int threads) {
  const int64_t useful = threads_for(threads, volume.batch * volume.image());
  if (volume.size[1] == 1) return static_cast<int>(useful);
  const int64_t most = volume.batch * volume.size[0] / (volume.metric.integral ? 1 : 2);
  return static_cast<int>(greater<int64_t>(lesser(useful, most), 1));
}

template <class Cost>
int64_t work_bytes(const Volume &volume) {
  Scratch scratch(nullptr);
  Work<Cost> work(scratch, volume);
  return scratch.used();
}

template <bool KEYS, class Cost>
void transform(const Volume &volume, bool edges, Scratch &scratch, int threads) {
  const Meaning meaning(volume.type);
  const Words words(scratch, volume, edges);
  const Apart<Cost> apart_y(scratch, volume.size[1]), apart_x(scratch, volume.size[2]);
  apart_y.fill(Costs<Cost>::side(volume.metric, 1), volume.size[1]);
  apart_x.fill(Costs<Cost>::side(volume.metric, 2), volume.size[2]);
  const int64_t bands = volume.bands(), plane = volume.plane(), own_bytes = work_bytes<Cost>(volume);

  // Tasks of about TASK_PIXELS.
  const int64_t rows = lesser<int64_t>(divide_up(TASK_PIXELS, BAND * volume.size[2]), volume.size[1]);
  const int64_t row_groups = divide_up(volume.size[1], rows), columns = TASK_PIXELS / BAND;
  const int64_t planes = lesser<int64_t>(divide_up(TASK_PIXELS, plane), volume.size[0]);
  const int64_t column_groups = divide_up(plane, columns), plane_groups = divide_up(volume.size[0], planes);

  const Step mark{volume.batch * bands * row_groups, [&](int64_t task, int) {
                    const int64_t band = task / row_groups, first = task % row_groups * rows;
                    with_width(meaning.width, [&](auto zero) {
                      using T = decltype(zero);
                      const T *image = static_cast<const T *>(volume.data) + band / bands * volume.stride_batch;
                      for (int64_t y = first; y < lesser<int64_t>(first + rows, volume.size[1]); ++y) {
                        const int64_t row = band * volume.size[1] + y, word = row * volume.size[2];
                        mark_words(volume, meaning, image, static_cast<int>(band % bands * BAND), static_cast<int>(y),
                                   words.seeds + word, edges ? words.wanted + word : nullptr,
                                   words.far + row * Words::groups(volume.size[2]));
                      }
                    });
                  }};
  const Step carry{words.carries ? volume.batch * column_groups : 0, [&](int64_t task, int) {
                     const int64_t word = task / column_groups * bands * plane, first = task % column_groups * columns;
                     carry_columns(words.seeds + word, words.carries + word, bands, plane, first,
                                   lesser(first + columns, plane));
                   }};
  const Step solve{volume.batch * plane_groups, [&](int64_t task, int worker) {
                     Scratch own(static_cast<char *>(scratch.rest()) + worker * own_bytes);
                     const Work<Cost> work(own, volume);
                     const int64_t first = task % plane_groups * planes;
                     solve_planes<KEYS>(volume, words, apart_y, apart_x, work, task / plane_groups,
                                        static_cast<int>(first),
                                        static_cast<int>(lesser<int64_t>(first + planes, volume.size[0])));
                   }};
  share(workers(volume, threads), mark, carry, solve);
}

template <class Cost>
int64_t scratch_bytes(const Volume &volume, bool edges, int threads) {
  Scratch scratch(nullptr);
  Words(scratch, volume, edges);
  Apart<Cost>(scratch, volume.size[1]);
  Apart<Cost>(scratch, volume.size[2]);
  return scratch.used() + workers(volume, threads) * work_bytes<Cost>(volume);
}

int transform(const char *name, const ContextrastVolume &given, bool edges, const ContextrastDistance &wanted,
              void *memory, int threads, char *error) {
  if (const int code = check_volume(name, given, edges, error)) return code;
  if (const int code = check_wanted(wanted, edges, error)) return code;
  const Volume volume(given, wanted);
  if (volume.batch <= 0 || volume.image() == 0) return CONTEXTRAST_OK;
  Scratch scratch(memory);
  if (volume.metric.integral)
    volume.keys() ? transform<true, int32_t>(volume, edges, scratch, threads)
                  : transform<false, int32_t>(volume, edges, scratch, threads);
  else
    volume.keys() ? transform<true, double>(volume, edges, scratch, threads)
                  : transform<false, double>(volume, edges, scratch, threads);
  return CONTEXTRAST_OK;
}

}  // namespace
}  // namespace contextrast

extern "C" {

// The scratch of a call that will be refused is none.
int64_t contextrast_distance_scratch_cpu(const ContextrastVolume *volume, const ContextrastDistance *wanted, int edges,
                                         int threads) {
  char error[CONTEXTRAST_ERROR_SIZE];
  if (contextrast::check_volume("the map", *volume, edges != 0, error) ||
      contextrast::check_wanted(*wanted, edges != 0, error))
    return 0;
  const contextrast::Volume own(*volume, *wanted);
  if (own.batch <= 0 || own.image() == 0) return 0;
  return own.metric.integral ? contextrast::scratch_bytes<int32_t>(own, edges != 0, threads)
                             : contextrast::scratch_bytes<double>(own, edges != 0, threads);
}

int contextrast_edge_distance_cpu(const ContextrastVolume *classes, const ContextrastDistance *wanted, void *scratch,
                                  int threads, char *error) {
  return contextrast::transform("classes", *classes, true, *wanted, scratch, threads, error);
}

int contextrast_distance_transform_cpu(const ContextrastVolume *mask, const ContextrastDistance *wanted, void *scratch,
                                       int threads, char *error) {
  return contextrast::transform("mask", *mask, false, *wanted, scratch, threads, error);
}

}  // extern "C"
