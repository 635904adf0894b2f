// edge_distance and distance_transform on the CPU, for lines, maps and volumes.
//   1. mark: the seeds, and for edge_distance the pixels whose distance is wanted, a bit each. A word has 32 pixels of a
//      column, which is a line along the first axis that is longer than 1.
//   2. carry: the nearest seeds above and below each word.
//   3. solve: plane after plane across the columns, first along y (in volumes), then along x. A block of LANES pixels,
//      neighbours along x, is settled by a window; the blocks that it leaves open are searched line by line.
// Only pixels that are wanted and no seed, the far ones, are searched for. Along any axis the neighbours of a run of far
// pixels are seeds, or the image ends there, so that no pixel beyond them matters.
#include <string.h>

#include <type_traits>

#include "host.h"
#include "lines.h"

namespace contextrast {
namespace {

constexpr int BAND = 32;
constexpr int LANES = 16;                          // pixels of a block
constexpr int STRIP = 64;                          // columns of a plane that are searched along y together
constexpr int WINDOW = 8, WINDOW_BESIDE_OPEN = 2;  // steps before a block is left to the search
constexpr int MARGIN = 32;                         // pixels without a seed around each line
constexpr int BLOCKS = CONTEXTRAST_MAX_SIDE / LANES + 1;
constexpr int TASK_PIXELS = 1 << 14;
static_assert(MARGIN >= WINDOW + LANES && BAND == 2 * LANES, "what is read beside a line");

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

// (B, bands, y, x) each. Where there is one band, no carries.
struct Words {
  uint32_t *seeds, *carries = nullptr, *wanted = nullptr;

  Words(Scratch &scratch, const Volume &volume, bool edges) {
    const int64_t count = volume.batch * volume.bands() * volume.plane();
    seeds = scratch.take<uint32_t>(count);
    if (volume.bands() > 1) carries = scratch.take<uint32_t>(count);
    if (edges) wanted = scratch.take<uint32_t>(count);
  }
};

// ---- 1. Mark

template <class T>
CONTEXTRAST_HD bool is_zero(T value) {
  return value == T(0);
}
struct Half {  // float16 or bfloat16
  uint16_t bits;
};
CONTEXTRAST_HD bool is_zero(Half value) { return (value.bits & 0x7FFF) == 0; }

// One row of zeros, whose pixels lie `step` elements apart.
template <class T>
CONTEXTRAST_HD void mark_zeros(const T *__restrict here, int64_t step, int width, int bit, uint32_t *__restrict seeds) {
  for (int64_t x = 0; x < width; ++x) seeds[x] |= static_cast<uint32_t>(is_zero(here[x * step])) << bit;
}

// One row of classes with its neighbours across; at a border of the image they are the row itself.
template <class T>
struct Across {
  const T *up, *down, *above, *below;
};

template <class T>
CONTEXTRAST_HD void mark_edge(const T *here, const Across<T> &across, int64_t x, int64_t left, int64_t right, int bit,
                              uint32_t &seeds, uint32_t &wanted) {
  const T own = here[x];
  seeds |= static_cast<uint32_t>(is_edge(own, across.up[x], across.down[x], across.above[x], across.below[x],
                                         here[left], here[right]))
           << bit;
  wanted |= static_cast<uint32_t>(own >= T(0)) << bit;
}

template <class T>
CONTEXTRAST_HD void mark_edges(const T *__restrict here, const Across<T> &across, int64_t step, int width, int bit,
                               uint32_t *__restrict seeds, uint32_t *__restrict wanted) {
  const int64_t last = width - 1;
  for (int64_t x = 1; x < last; ++x)
    mark_edge(here, across, x * step, (x - 1) * step, (x + 1) * step, bit, seeds[x], wanted[x]);
  for (const int64_t x : {int64_t(0), last})
    mark_edge(here, across, x * step, greater<int64_t>(x - 1, 0) * step, lesser(x + 1, last) * step, bit, seeds[x],
              wanted[x]);
}

// The words of row y of one band, which starts at plane `top`.
template <class T>
CONTEXTRAST_CLONES void mark_words(const Volume &volume, const T *image, int top, int y, uint32_t *seeds,
                                   uint32_t *wanted) {
  const int width = volume.size[2];
  const int64_t step = volume.stride[2];
  memset(seeds, 0, static_cast<size_t>(width) * sizeof *seeds);
  if (wanted) memset(wanted, 0, static_cast<size_t>(width) * sizeof *wanted);
  for (int z = top; z < lesser(top + BAND, volume.size[0]); ++z) {
    const T *here = image + z * volume.stride[0] + y * volume.stride[1];
    if constexpr (!std::is_arithmetic_v<T>) {
      mark_zeros(here, step, width, z - top, seeds);
    } else if (!wanted) {
      if (step == 1)
        mark_zeros(here, 1, width, z - top, seeds);
      else
        mark_zeros(here, step, width, z - top, seeds);
    } else if constexpr (std::is_integral_v<T>) {
      const Across<T> across{z > 0 ? here - volume.stride[0] : here,
                             z + 1 < volume.size[0] ? here + volume.stride[0] : here,
                             y > 0 ? here - volume.stride[1] : here,
                             y + 1 < volume.size[1] ? here + volume.stride[1] : here};
      if (step == 1)
        mark_edges(here, across, 1, width, z - top, seeds, wanted);
      else
        mark_edges(here, across, step, width, z - top, seeds, wanted);
    }
  }
}

// body(T()) for the C++ type T of a volume.
template <class Body>
void with_type(int32_t type, const Body &body) {
  switch (type) {
    case CONTEXTRAST_UINT16: return body(uint16_t());
    case CONTEXTRAST_UINT32: return body(uint32_t());
    case CONTEXTRAST_UINT64: return body(uint64_t());
    case CONTEXTRAST_FLOAT16:
    case CONTEXTRAST_BFLOAT16: return body(Half());
    case CONTEXTRAST_FLOAT32: return body(float());
    case CONTEXTRAST_FLOAT64: return body(double());
    default: return with_integer(type, body);
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

template <class Cost>
struct Same;  // a signed integer of the size of a cost
template <>
struct Same<int32_t> {
  using Integer = int32_t;
};
template <>
struct Same<double> {
  using Integer = int64_t;
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
    const int64_t count = (size + 2 * MARGIN) * abreast;
    costs = scratch.take<Cost>(count);
    best = scratch.take<Cost>(count);
    keys = with_keys ? scratch.take<int32_t>(count) : nullptr;
    best_keys = with_keys ? scratch.take<int32_t>(count) : nullptr;
    if (costs) {
      for (int64_t i = 0; i < MARGIN * abreast; ++i) costs[i] = costs[count - 1 - i] = Costs<Cost>::none;
      for (int64_t i = 0; with_keys && i < MARGIN * abreast; ++i) keys[i] = keys[count - 1 - i] = INT32_MAX;
      costs += MARGIN * abreast;
      if (with_keys) keys += MARGIN * abreast;
    }
  }
};

// Whether a pixel `next` away could still improve a block: a seed there, or with keys one as near that comes first.
template <bool KEYS, class Cost>
CONTEXTRAST_HD bool is_open(const Cost *best, Cost next) {
  Cost most = best[0];
  for (int i = 1; i < LANES; ++i) most = greater(most, best[i]);
  return KEYS ? most >= next : most > next;
}

template <bool KEYS, class Cost>
CONTEXTRAST_HD void try_candidate(Cost cost, int32_t key, Cost &best, int32_t &best_key) {
  if constexpr (KEYS) {
    const bool is_better = (cost < best) | ((cost == best) & (key < best_key));
    best = is_better ? cost : best;
    best_key = is_better ? key : best_key;
  } else {
    best = lesser(best, cost);
  }
}

// The window of one block, `steps` pixels to either side, which lie `step` elements apart. True if the block is settled.
template <bool KEYS, class Cost>
CONTEXTRAST_HD bool window(const Cost *costs, const int32_t *keys, int64_t step, const Cost *apart, int steps,
                           Cost *best, int32_t *best_keys) {
  if (!is_open<KEYS>(best, apart[1])) return true;
  for (int k = 1; k <= steps; ++k) {
    const Cost *before = costs - k * step, *after = costs + k * step;
    const Cost cost = apart[k];
    if constexpr (KEYS) {
      const int32_t *keys_before = keys - k * step, *keys_after = keys + k * step;
      for (int i = 0; i < LANES; ++i) {
        try_candidate<KEYS>(before[i] + cost, keys_before[i], best[i], best_keys[i]);
        try_candidate<KEYS>(after[i] + cost, keys_after[i], best[i], best_keys[i]);
      }
    } else {
      for (int i = 0; i < LANES; ++i) best[i] = lesser(best[i], lesser(before[i], after[i]) + cost);
    }
    if (k % 2 == 0 && !is_open<KEYS>(best, apart[k + 1])) return true;
  }
  return false;
}

// The first pixel of first..last that is best for pixel x. What it looks at beyond `last` cannot be better.
template <class Cost>
CONTEXTRAST_HD int first_best(const Cost *costs, const Cost *apart, int x, int first, int last) {
  using Integer = typename Same<Cost>::Integer;
  Cost low[LANES];
  Integer chunk[LANES];
  for (int i = 0; i < LANES; ++i) {
    low[i] = Costs<Cost>::none;
    chunk[i] = first;
  }
  for (int u = first; u <= last; u += LANES) {
    const Cost *here = costs + u, *away = apart + (u - x);
    for (int i = 0; i < LANES; ++i) {
      const Cost cost = here[i] + away[i];
      chunk[i] = cost < low[i] ? Integer(u) : chunk[i];
      low[i] = lesser(low[i], cost);
    }
  }
  Cost least = low[0];
  for (int i = 1; i < LANES; ++i) least = lesser(least, low[i]);
  Integer place = INT32_MAX;
  for (int i = 0; i < LANES; ++i) place = lesser(place, low[i] == least ? chunk[i] + i : Integer(INT32_MAX));
  return static_cast<int>(place);
}

// best = the least cost of the block's pixels x.. over the pixels first..last of the line.
template <bool KEYS, class Cost>
CONTEXTRAST_HD void sweep(const Cost *costs, const int32_t *keys, const Cost *apart, int x, int first, int last,
                          Cost *best, int32_t *best_keys) {
  Cost low[LANES];
  int32_t low_keys[LANES];
  for (int i = 0; i < LANES; ++i) low[i] = best[i];
  for (int i = 0; KEYS && i < LANES; ++i) low_keys[i] = best_keys[i];
  for (int u = first; u <= last; ++u) {
    const Cost cost = costs[u];
    const Cost *away = apart + (x - u);
    for (int i = 0; i < LANES; ++i) try_candidate<KEYS>(cost + away[i], KEYS ? keys[u] : 0, low[i], low_keys[i]);
  }
  for (int i = 0; i < LANES; ++i) best[i] = low[i];
  for (int i = 0; KEYS && i < LANES; ++i) best_keys[i] = low_keys[i];
}

// Solves the open blocks of a line: anchors, which are the first pixels of blocks, by bisection, then each block between
// its own anchor's best and the next one's.
template <bool KEYS, class Cost>
CONTEXTRAST_HD void search_line(const Line<Cost> &line, const Cost *apart, int size, bool bisects,
                                const uint8_t *open) {
  int first = 0, last = size - 1, from = 0, to = (size - 1) / LANES;
  while (from <= to && !open[from]) ++from;
  if (from > to) return;
  while (!open[to]) --to;
  while (first < size && !has_seed(line.costs[first])) ++first;
  if (first == size) return;
  while (!has_seed(line.costs[last])) --last;

  int place[BLOCKS + 1];
  const int count = to - from + 1;
  place[0] = first;
  place[count] = last;
  if (bisects) {
    place[0] = first_best(line.costs, apart, from * LANES, first, last);
    place[count] = first_best(line.costs, apart, (to + 1) * LANES, place[0], last);
    for (int step = first_step(count); step; step /= 2)
      for (int j = step; j < count; j += 2 * step)
        place[j] = first_best(line.costs, apart, (from + j) * LANES, place[j - step], place[lesser(j + step, count)]);
  }
  for (int j = 0; j < count; ++j) {
    if (!open[from + j]) continue;
    const int x = (from + j) * LANES;
    sweep<KEYS>(line.costs, line.keys, apart, x, bisects ? place[j] : first, bisects ? place[j + 1] : last,
                line.best + x, KEYS ? line.best_keys + x : nullptr);
  }
}

// The bits of one row of a plane.
struct Row {
  const uint32_t *seeds, *carries, *wanted;
  int bit;

  CONTEXTRAST_HD uint32_t carry(int x) const { return carries ? carries[x] : pack_carry(NO_SEED, NO_SEED); }
  CONTEXTRAST_HD uint32_t wishes(int x) const { return wanted ? wanted[x] : ~0u; }

  // Whether one of the pixels x..x+count-1 is far.
  CONTEXTRAST_HD bool is_far(int x, int count) const {
    uint32_t far = 0;
    if (wanted)
      for (int i = x; i < x + count; ++i) far |= wanted[i] & ~seeds[i];
    else
      for (int i = x; i < x + count; ++i) far |= ~seeds[i];
    return far >> bit & 1;
  }
};

// Costs along the columns, at pixels x..x+count-1 of a row. `number` is that of the row's pixel 0 in its image.
template <bool KEYS, class Cost>
CONTEXTRAST_HD void read_columns(const Row &row, int x, int count, Cost side, int32_t number, int64_t plane,
                                 Cost *costs, int32_t *keys, Cost *best) {
  for (int i = 0; i < count; ++i) {
    const uint32_t steps = column_distance(row.seeds[x + i], row.bit, row.carry(x + i));
    const bool is_wanted = row.wishes(x + i) >> row.bit & 1;
    const Cost cost = steps >= NO_SEED || !is_wanted
                          ? Costs<Cost>::none
                          : Costs<Cost>::apart(side, static_cast<int>(steps >= NO_SEED ? 0 : steps));
    costs[i] = cost;
    best[i] = is_wanted ? cost : Cost(CONTEXTRAST_OUTSIDE);
    if constexpr (KEYS) {
      const int32_t offset = column_offset(row.seeds[x + i], row.bit, row.carry(x + i));
      keys[i] = offset == NO_OFFSET ? INT32_MAX : static_cast<int32_t>(number + x + i + offset * plane);
    }
  }
}

// The same where none of the pixels is far: those that are wanted are seeds.
template <bool KEYS, class Cost>
CONTEXTRAST_HD void read_seeds(const Row &row, int x, int count, int32_t number, Cost *costs, int32_t *keys,
                               Cost *best) {
  for (int i = 0; i < count; ++i) {
    const bool is_seed = row.wishes(x + i) >> row.bit & 1;
    costs[i] = is_seed ? Cost(0) : Costs<Cost>::none;
    best[i] = is_seed ? Cost(0) : Cost(CONTEXTRAST_OUTSIDE);
    if constexpr (KEYS) keys[i] = number + x + i;
  }
}

template <bool KEYS, class Cost>
CONTEXTRAST_HD void read_row(const Row &row, int x, int count, Cost side, int32_t number, int64_t plane, Cost *costs,
                             int32_t *keys, Cost *best, int32_t *best_keys) {
  for (int i = 0; i < count; i += LANES) {
    const int lanes = lesser(LANES, count - i);
    int32_t *const own_keys = KEYS ? keys + i : nullptr;
    if (!row.is_far(x + i, lanes))
      read_seeds<KEYS>(row, x + i, lanes, number, costs + i, own_keys, best + i);
    else if (lanes == LANES)
      read_columns<KEYS>(row, x + i, LANES, side, number, plane, costs + i, own_keys, best + i);
    else
      read_columns<KEYS>(row, x + i, lanes, side, number, plane, costs + i, own_keys, best + i);
  }
  const int padded = (count + LANES - 1) / LANES * LANES;
  for (int i = count; i < padded; ++i) {
    costs[i] = Costs<Cost>::none;
    best[i] = Cost(CONTEXTRAST_OUTSIDE);
    if constexpr (KEYS) keys[i] = INT32_MAX;
  }
  for (int i = 0; KEYS && i < padded; ++i) best_keys[i] = keys[i];
}

// A worker's memory.
template <class Cost>
struct Work {
  int strip;         // columns of a plane at a time
  Cost *costs;       // of a plane, along the columns and y: only where there are several rows
  int32_t *keys;     // likewise
  Line<Cost> strips, column, row;
  uint8_t *open, *open_blocks;  // (y, blocks of a strip), (blocks of a line)

  Work(Scratch &scratch, const Volume &volume)
      : strip(lesser(STRIP, (volume.size[2] + LANES - 1) / LANES * LANES)),
        costs(has_rows(volume) ? scratch.take<Cost>(volume.plane()) : nullptr),
        keys(has_rows(volume) && volume.keys() ? scratch.take<int32_t>(volume.plane()) : nullptr),
        strips(scratch, has_rows(volume) ? volume.size[1] : 0, strip, volume.keys()),
        column(scratch, has_rows(volume) ? volume.size[1] : 0, 1, volume.keys()),
        row(scratch, volume.size[2], 1, volume.keys()),
        open(scratch.take<uint8_t>(volume.size[1] * int64_t(STRIP / LANES))),
        open_blocks(scratch.take<uint8_t>(BLOCKS)) {}

  static bool has_rows(const Volume &volume) { return volume.size[1] > 1; }
};

// The columns x..x+count-1 of a plane, abreast, along y: into work.costs and work.keys.
template <bool KEYS, class Cost>
CONTEXTRAST_HD void solve_strip(const Volume &volume, const Row &plane_bits, int z, int x, int count,
                                const Apart<Cost> &apart, const Work<Cost> &work) {
  const int height = volume.size[1], width = volume.size[2], strip = work.strip, blocks = (count + LANES - 1) / LANES;
  const Cost side = Costs<Cost>::side(volume.metric, 0);
  const Line<Cost> &strips = work.strips, &column = work.column;
  for (int y = 0; y < height; ++y) {
    const int64_t start = int64_t(y) * width, at = int64_t(y) * strip;
    const Row row{plane_bits.seeds + start, plane_bits.carries ? plane_bits.carries + start : nullptr,
                  plane_bits.wanted ? plane_bits.wanted + start : nullptr, plane_bits.bit};
    read_row<KEYS>(row, x, count, side, static_cast<int32_t>(z * volume.plane() + start), volume.plane(),
                   strips.costs + at, KEYS ? strips.keys + at : nullptr, strips.best + at,
                   KEYS ? strips.best_keys + at : nullptr);
  }
  for (int block = 0; block < blocks; ++block) {
    bool is_open = false, any_open = false;
    for (int y = 0; y < height; ++y) {
      const int64_t at = int64_t(y) * strip + block * LANES;
      is_open = !window<KEYS>(strips.costs + at, KEYS ? strips.keys + at : nullptr, strip, apart.zero,
                              is_open ? WINDOW_BESIDE_OPEN : WINDOW, strips.best + at,
                              KEYS ? strips.best_keys + at : nullptr);
      work.open[y] = is_open;
      any_open |= is_open;
    }
    if (!any_open) continue;
    const Cost settled = apart.zero[WINDOW_BESIDE_OPEN + 1];
    for (int lane = block * LANES; lane < lesser(count, (block + 1) * LANES); ++lane) {
      memset(work.open_blocks, 0, static_cast<size_t>(height / LANES + 1));
      for (int y = 0; y < height; ++y) {
        const int64_t at = int64_t(y) * strip + lane;
        column.costs[y] = strips.costs[at];
        column.best[y] = strips.best[at];
        if constexpr (KEYS) column.keys[y] = strips.keys[at], column.best_keys[y] = strips.best_keys[at];
        work.open_blocks[y / LANES] |= work.open[y] & (column.best[y] >= settled);
      }
      search_line<KEYS>(column, apart.zero, height, volume.metric.search[1] != 0, work.open_blocks);
      for (int y = 0; y < height; ++y) {
        const int64_t at = int64_t(y) * strip + lane;
        strips.best[at] = column.best[y];
        if constexpr (KEYS) strips.best_keys[at] = column.best_keys[y];
      }
    }
  }
  for (int y = 0; y < height; ++y) {
    const int64_t to = int64_t(y) * width + x, at = int64_t(y) * strip;
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
    const int32_t key = keys[x], none = has_seed(best[x]) ? 0 : -1;
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

// Planes first..last-1 of an image.
template <bool KEYS, class Cost>
CONTEXTRAST_CLONES void solve_planes(const Volume &volume, const Words &words, const Apart<Cost> &apart_y,
                                     const Apart<Cost> &apart_x, const Work<Cost> &work, int64_t image, int first,
                                     int last) {
  const int height = volume.size[1], width = volume.size[2];
  const Line<Cost> &line = work.row;
  for (int z = first; z < last; ++z) {
    const int64_t word = (image * volume.bands() + z / BAND) * volume.plane();
    const Row bits{words.seeds + word, words.carries ? words.carries + word : nullptr,
                   words.wanted ? words.wanted + word : nullptr, z % BAND};
    if (height > 1)
      for (int x = 0; x < width; x += work.strip)
        solve_strip<KEYS>(volume, bits, z, x, lesser(work.strip, width - x), apart_y, work);
    for (int y = 0; y < height; ++y) {
      const int64_t start = int64_t(y) * width;
      if (height > 1) {
        for (int x = 0; x < width; ++x) {
          const Cost cost = work.costs[start + x];
          line.costs[x] = cost < 0 ? Costs<Cost>::none : cost;
          line.best[x] = cost;
        }
        for (int x = width; x < width + LANES; ++x) line.best[x] = Cost(CONTEXTRAST_OUTSIDE);
        if constexpr (KEYS) {
          memcpy(line.keys, work.keys + start, static_cast<size_t>(width) * sizeof(int32_t));
          memcpy(line.best_keys, work.keys + start, static_cast<size_t>(width) * sizeof(int32_t));
        }
      } else {
        read_row<KEYS>(bits, 0, width, Costs<Cost>::side(volume.metric, 0),
                       static_cast<int32_t>(z * volume.plane()), volume.plane(), line.costs, line.keys, line.best,
                       line.best_keys);
      }
      bool is_open = false, any_open = false;
      for (int x = 0; x < width; x += LANES) {
        is_open = !window<KEYS>(line.costs + x, KEYS ? line.keys + x : nullptr, 1, apart_x.zero,
                                is_open ? WINDOW_BESIDE_OPEN : WINDOW, line.best + x,
                                KEYS ? line.best_keys + x : nullptr);
        work.open_blocks[x / LANES] = is_open;
        any_open |= is_open;
      }
      if (any_open) search_line<KEYS>(line, apart_x.zero, width, volume.metric.search[2] != 0, work.open_blocks);
      const int64_t at = image * volume.image() + z * volume.plane() + start;
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
                    with_type(volume.type, [&](auto zero) {
                      using T = decltype(zero);
                      const T *image = static_cast<const T *>(volume.data) + band / bands * volume.stride_batch;
                      for (int64_t y = first; y < lesser<int64_t>(first + rows, volume.size[1]); ++y) {
                        const int64_t word = band * plane + y * volume.size[2];
                        mark_words(volume, image, static_cast<int>(band % bands * BAND), static_cast<int>(y),
                                   words.seeds + word, edges ? words.wanted + word : nullptr);
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
