// edge_distance and distance_transform on the CPU, for lines, maps and volumes.
//   1. mark: one bit per pixel for the sites, and for edge_distance one for the pixels whose distance is wanted. A word
//      has 32 pixels of a column, which is a line along the first axis that is longer than 1.
//   2. carry: the nearest sites above and below each word.
//   3. solve: plane after plane across the columns, first along y (in volumes), then along x. A window settles most
//      blocks, which have 64 bytes of costs of neighbours along x. The others are searched line by line.
// A pixel is pending if its distance is wanted and it is no site. Only pending pixels are searched for, and blocks
// without one are skipped. Along any axis a run of pending pixels ends at sites or at the border of the image, so that
// no pixel beyond them matters.
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "search.h"
#include "volume.h"
#include "words.h"

namespace contextrast {
namespace {

constexpr int STRIP = 64;  // columns of a plane that are searched along y together
constexpr int TASK_PIXELS = 1 << 14;     // about the fewest pixels of a task
constexpr int64_t TASKS_OF_WORKER = 16;  // tasks are not made so large that a worker would have fewer
constexpr int64_t HUGE_PAGE = 2 << 20;   // bytes

// ---- 3. Solve

// The bits of one row of a plane.
struct Row {
  const uint32_t *sites, *carries, *wanted, *pending;  // carries, wanted: null if there are none, or all are
  int bit;

  // Row `row` of all rows of words.
  CONTEXTRAST_HD Row(const Words &words, int64_t row, int width, int bit)
      : sites(words.sites + row * width),
        carries(words.carries ? words.carries + row * width : nullptr),
        wanted(words.wanted ? words.wanted + row * width : nullptr),
        pending(words.pending + row * Words::groups(width)),
        bit(bit) {}

  // Whether one of the pixels x..x+count-1 is pending; x is a multiple of eight, and count is rounded up to one.
  CONTEXTRAST_HD bool any_pending(int x, int count) const {
    uint32_t found = 0;
    for (int i = 0; i < count; i += 8) found |= pending[(x + i) / 8];
    return found >> bit & 1;
  }

  // -1 for each of eight pixels that is wanted, else 0.
  CONTEXTRAST_HD Ints wanted_from(int x) const {
    return wanted ? reinterpret_cast<Ints>(load<Words8>(wanted + x) << (31 - bit)) < 0 : Ints{} - 1;
  }
};

// Eight pixels of a row: the steps to the nearest site of their columns, and whether it is below (only of use if there
// is one). Leading and trailing zeros come from the exponents of floats.
struct Columns {
  Ints steps, is_below;

  CONTEXTRAST_HD Columns(const Row &row, int x) {
    const Words8 sites = load<Words8>(row.sites + x);
    const Words8 carries = row.carries ? load<Words8>(row.carries + x) : Words8{} + pack_carry(NO_SITE, NO_SITE);
    const Ints upward = reinterpret_cast<Ints>(sites << (31 - row.bit));
    const Ints downward = reinterpret_cast<Ints>(sites >> row.bit);
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
  if (!row.any_pending(x, 8)) {  // those that are wanted are sites
    put_costs(Ints{}, Ints{} - 1, is_wanted, side, costs, best);
    if constexpr (KEYS) {
      store(key, keys);
      store(key, best_keys);
    }
    return;
  }
  const Columns columns(row, x);
  const Ints has_cost = columns.steps < int32_t(NO_SITE);
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
}

// Clears the pixels from `end` on that a block starting before it reaches: they are no sites and not wanted.
template <bool KEYS, class Cost>
CONTEXTRAST_HD void end_line(const Line<Cost> &line, int64_t end) {
  for (int64_t i = end; i < end + LANES<int32_t>; ++i) {
    line.costs[i] = Costs<Cost>::none;
    line.best[i] = Cost(CONTEXTRAST_OUTSIDE);
    if constexpr (KEYS) line.keys[i] = line.best_keys[i] = INT32_MAX;
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
        keys(has_rows(volume) && volume.has_keys() ? scratch.take<int32_t>(volume.plane()) : nullptr),
        strips(scratch, has_rows(volume) ? volume.size[1] : 0, pitch(), volume.has_keys()),
        columns(scratch, has_rows(volume) ? column_size(volume) * LANES<Cost> : 0, 1, volume.has_keys()),
        row(scratch, volume.size[2], 1, volume.has_keys()),
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

// Solves what the window has left open in the columns lane..lane+LANES-1 of a strip.
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
      Places is_pending{}, is_open{};
      for (int y = block * lanes; y < lesser(height, (block + 1) * lanes); ++y) {
        if (work.states[y] == WITHOUT_PENDING) continue;
        const V best = load<V>(from.best + y * pitch);
        is_pending |= best > zero;
        if (work.states[y] == OPEN) is_open |= best >= settled;
      }
      for (int i = 0; i < half; ++i)
        work.block_states[(part + i) * blocks + block] = is_open[i] ? OPEN : is_pending[i] ? SETTLED : WITHOUT_PENDING;
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

// Solves the columns x..x+count-1 of a plane, abreast, along y. The results go to work.costs and work.keys.
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
    end_line<KEYS>(strips, at + count);
  }
  for (int lane = 0; lane < count; lane += LANES<Cost>) {
    bool is_open = false, any_open = false;
    for (int y = 0; y < height; ++y) {
      const int64_t at = y * pitch + lane;
      const bool any_pending = Row(words, rows + y, width, z % BAND).any_pending(x + lane, LANES<Cost>);
      is_open = any_pending && !window<KEYS>(strips.costs + at, KEYS ? strips.keys + at : nullptr, pitch, apart.zero,
                              is_open ? WINDOW_BESIDE_OPEN : WINDOW, strips.best + at,
                              KEYS ? strips.best_keys + at : nullptr);
      work.states[y] = is_open ? OPEN : any_pending ? SETTLED : WITHOUT_PENDING;
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

// ---- The results of one row, which starts at output element `at`.

CONTEXTRAST_HD int32_t quotient(int32_t number, int32_t divisor, double inverse) {  // number >= 0
  const int32_t guess = static_cast<int32_t>(number * inverse);
  const int64_t rest = number - int64_t(guess) * divisor;
  return rest < 0 ? guess - 1 : rest >= divisor ? guess + 1 : guess;
}

// Pixels at..at+count-1 of the output, which lie in one row.
template <class Cost>
CONTEXTRAST_HD void write_nearest(const Volume &volume, const Cost *best, const int32_t *keys, int64_t at, int count) {
  const int width = volume.size[2];
  const int32_t plane = static_cast<int32_t>(volume.plane());
  const double per_plane = 1.0 / plane, per_row = 1.0 / width;
  int32_t *const *nearest = volume.wanted.nearest;
  for (int x = 0; x < count; ++x) {
    const bool is_known = has_site(best[x]);  // without a site the key may be any number
    const int32_t key = is_known ? keys[x] : 0, none = is_known ? 0 : -1;
    const int32_t z = quotient(key, plane, per_plane), in_plane = key - z * plane;
    const int32_t y = quotient(in_plane, width, per_row);
    if (nearest[0]) nearest[0][at + x] = z | none;
    if (nearest[1]) nearest[1][at + x] = y | none;
    if (nearest[2]) nearest[2][at + x] = (in_plane - y * width) | none;
  }
}

constexpr int32_t EXACT_IN_FLOAT = 1 << 24;

CONTEXTRAST_HD void write_distances(const Metric &metric, const int32_t *best, int count, float *distance) {
  const double unit_length = sqrt(metric.unit);  // exact: an even power of two
  if (metric.largest < EXACT_IN_FLOAT && unit_length > 1e-15 && unit_length < 1e15) {
    // For these integers the root in float equals the root in double, rounded to float.
    const float length = static_cast<float>(unit_length);
    for (int x = 0; x < count; ++x) {
      const float root = sqrtf(static_cast<float>(greater(best[x], 0))) * length;
      distance[x] = best[x] < 0 ? -1.0f : has_site(best[x]) ? root : INFINITY;
    }
  } else {
    for (int x = 0; x < count; ++x)
      distance[x] = best[x] < 0          ? -1.0f
                    : has_site(best[x]) ? static_cast<float>(sqrt(static_cast<double>(best[x])) * unit_length)
                                         : INFINITY;
  }
}

CONTEXTRAST_HD void write_distances(const Metric &, const double *best, int count, float *distance) {
  for (int x = 0; x < count; ++x)
    distance[x] = best[x] < 0 ? -1.0f : static_cast<float>(sqrt(greater(best[x], 0.0)));
}

template <class Cost>
CONTEXTRAST_HD void write_costs(const Volume &volume, const Cost *best, int64_t at, int count) {
  if (!volume.wanted.squared) {
    write_distances(volume.metric, best, count, static_cast<float *>(volume.wanted.distance) + at);
  } else if (volume.wanted.sampled) {
    double *const distance = static_cast<double *>(volume.wanted.distance) + at;
    for (int x = 0; x < count; ++x) distance[x] = best[x] < 0 ? -1.0 : in_pixels_squared(best[x], volume.metric);
  } else {
    int32_t *const distance = static_cast<int32_t *>(volume.wanted.distance) + at;
    for (int x = 0; x < count; ++x)
      distance[x] = has_site(best[x]) ? static_cast<int32_t>(best[x]) : CONTEXTRAST_NO_EDGE;
  }
}

// The results where no pixel is pending: every wanted pixel is a site.
template <class T>
CONTEXTRAST_HD void write_sites(const uint32_t *wanted, int bit, int count, T *distance) {
  for (int x = 0; x < count; ++x)
    distance[x] = !wanted || wanted[x] >> bit & 1 ? T(0) : T(CONTEXTRAST_OUTSIDE);
}

template <bool KEYS>
CONTEXTRAST_HD void write_sites(const Volume &volume, const Row &row, int z, int y, int x, int64_t at, int count) {
  const ContextrastDistance &to = volume.wanted;
  const uint32_t *const wanted = row.wanted ? row.wanted + x : nullptr;
  if (!to.squared)
    write_sites(wanted, row.bit, count, static_cast<float *>(to.distance) + at);
  else if (to.sampled)
    write_sites(wanted, row.bit, count, static_cast<double *>(to.distance) + at);
  else
    write_sites(wanted, row.bit, count, static_cast<int32_t *>(to.distance) + at);
  if constexpr (KEYS)  // every site is its own nearest one
    for (int i = 0; i < count; ++i) {
      if (to.nearest[0]) to.nearest[0][at + i] = z;
      if (to.nearest[1]) to.nearest[1][at + i] = y;
      if (to.nearest[2]) to.nearest[2][at + i] = x + i;
    }
}

template <class Cost>
CONTEXTRAST_HD Cost least_of(const Cost *from, const Cost *end) {
  Cost least = Costs<Cost>::none;
  for (; from < end; ++from) least = lesser(least, *from);
  return least;
}

// Blocks beside a run that its window reads.
template <class Cost>
constexpr int BESIDE = (LONG_WINDOW + LANES<Cost> - 1) / LANES<Cost>;

// Solves row y of plane z, whose first output element is `at`: runs of blocks with pending pixels, and runs without.
template <bool KEYS, class Cost>
CONTEXTRAST_HD void solve_row(const Volume &volume, const Row &row, const Apart<Cost> &apart, const Work<Cost> &work,
                              int z, int y, int64_t at) {
  constexpr int lanes = LANES<Cost>;
  const int width = volume.size[2], blocks = Work<Cost>::blocks(width);
  const Line<Cost> &line = work.row;
  const auto read = [&](int x, int end) {  // of the row's costs
    end = lesser(end, width);
    if (volume.size[1] == 1) {
      const Line<Cost> from = line.from(x);
      read_row<KEYS>(row, x, end - x, Costs<Cost>::side(volume.metric, 0), static_cast<int32_t>(z * volume.plane()),
                     volume.plane(), from.costs, from.keys, from.best, from.best_keys);
    } else {
      const int64_t start = int64_t(y) * width;
      for (int u = x; u < end; ++u) {
        const Cost cost = work.costs[start + u];
        line.costs[u] = cost < 0 ? Costs<Cost>::none : cost;
        line.best[u] = cost;
        if constexpr (KEYS) line.keys[u] = line.best_keys[u] = work.keys[start + u];
      }
    }
    if (end == width) end_line<KEYS>(line, width);
  };
  for (int from = 0, end, known = 0; from < blocks; from = end) {  // blocks before `known` have been read
    const int x = from * lanes;
    const bool any_pending = row.any_pending(x, lanes);
    for (end = from + 1; end < blocks && row.any_pending(end * lanes, lanes) == any_pending;) ++end;
    const int count = lesser(end * lanes, width) - x;
    if (!any_pending) {
      write_sites<KEYS>(volume, row, z, y, x, at + x, count);
      continue;
    }
    const int last = lesser(end + BESIDE<Cost>, blocks);
    read(greater(known, from - BESIDE<Cost>) * lanes, last * lanes);
    known = last;
    if (!has_site(least_of(line.costs + greater(x - 1, 0), line.costs + x + count + 1))) {
      write_costs(volume, line.best + x, at + x, count);
      if constexpr (KEYS) write_nearest(volume, line.best + x, line.best_keys + x, at + x, count);
      continue;
    }
    bool is_open = false, any_open = false;
    for (int block = from; block < end; ++block) {
      const Line<Cost> own = line.from(block * lanes);
      const bool is_hopeless = is_open && is_open_at<KEYS>(own.best, apart.zero[LONG_WINDOW + 1]);
      is_open = is_hopeless || !window<KEYS>(own.costs, own.keys, 1, apart.zero,
                                             is_open ? WINDOW_BESIDE_OPEN : WINDOW, own.best, own.best_keys);
      work.block_states[block] = is_open ? OPEN : SETTLED;
      any_open |= is_open;
    }
    if (any_open)
      search_run<KEYS>(line, apart.zero, width, volume.metric.search[2] != 0, work.block_states, from, end);
    write_costs(volume, line.best + x, at + x, count);
    if constexpr (KEYS) write_nearest(volume, line.best + x, line.best_keys + x, at + x, count);
  }
}

// Solves the planes first..last-1 of an image.
template <bool KEYS, class Cost>
CONTEXTRAST_CLONES void solve_planes(const Volume &volume, const Words &words, const Apart<Cost> &apart_y,
                                     const Apart<Cost> &apart_x, const Work<Cost> &work, int64_t image, int first,
                                     int last) {
  const int height = volume.size[1], width = volume.size[2];
  for (int z = first; z < last; ++z) {
    const int64_t rows = (image * volume.bands() + z / BAND) * height;
    if (height > 1)
      for (int x = 0; x < width; x += work.strip)
        solve_strip<KEYS>(volume, words, rows, z, x, lesser(work.strip, width - x), apart_y, work);
    for (int y = 0; y < height; ++y)
      solve_row<KEYS>(volume, Row(words, rows + y, width, z % BAND), apart_x, work, z, y,
                      image * volume.image() + z * volume.plane() + int64_t(y) * width);
  }
}

// ---- The memory of the results

// Asks the system for huge pages, as NumPy does for arrays of this size. A large result is fresh memory. Faulting it in
// by small pages would take about a third of a call.
void use_huge_pages([[maybe_unused]] void *memory, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t LARGE = 4 << 20;
  if (bytes < LARGE) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (start + page - 1) / page * page, end = start + static_cast<uintptr_t>(bytes);
  madvise(reinterpret_cast<void *>(first), end - first, MADV_HUGEPAGE);  // if it fails, the pages stay small
#endif
}

void use_huge_pages(const Volume &volume) {
  const int64_t pixels = volume.batch * volume.image();
  const bool is_double = volume.wanted.squared && volume.wanted.sampled;
  use_huge_pages(volume.wanted.distance, pixels * static_cast<int64_t>(is_double ? sizeof(double) : sizeof(float)));
  for (int32_t *nearest : volume.wanted.nearest)
    if (nearest) use_huge_pages(nearest, pixels * static_cast<int64_t>(sizeof *nearest));
}

// ---- The three passes

template <class Cost>
int64_t work_bytes(const Volume &volume) {
  Scratch scratch(nullptr);
  Work<Cost> work(scratch, volume);
  return scratch.used();
}

// The workers of the last pass. In volumes each has a plane of costs, so there are only as many as keep the scratch, of
// which `shared` bytes are not a worker's, below 5/4 of the output.
template <class Cost>
int workers(const Volume &volume, int threads, int64_t shared) {
  const ContextrastDistance &wanted = volume.wanted;
  const int64_t useful = threads_for(threads, volume.batch * volume.image());
  if (volume.size[1] == 1) return static_cast<int>(useful);
  int64_t bytes = wanted.squared && wanted.sampled ? sizeof(double) : sizeof(float);
  for (const int32_t *nearest : wanted.nearest) bytes += nearest ? sizeof *nearest : 0;
  const int64_t most = (volume.batch * volume.image() * bytes / 4 * 5 - shared) / work_bytes<Cost>(volume);
  return static_cast<int>(greater<int64_t>(lesser(useful, most), 1));
}

template <bool KEYS, class Cost>
void transform(const Volume &volume, bool edges, Scratch &scratch, int threads) {
  const Meaning meaning(volume.type);
  const Words words(scratch, volume, edges);
  const Apart<Cost> apart_y(scratch, volume.size[1]), apart_x(scratch, volume.size[2]);
  apart_y.fill(Costs<Cost>::side(volume.metric, 1), volume.size[1]);
  apart_x.fill(Costs<Cost>::side(volume.metric, 2), volume.size[2]);
  const int64_t bands = volume.bands(), plane = volume.plane(), own_bytes = work_bytes<Cost>(volume);

  // Two workers that meet a new huge page at once would both clear it, so a task of the last pass writes a whole one
  // where each worker still has enough tasks.
  const int threads_used = workers<Cost>(volume, threads, scratch.used());
  const int64_t task_pixels = greater<int64_t>(
      TASK_PIXELS, lesser<int64_t>(volume.batch * volume.image() / threads_used / TASKS_OF_WORKER,
                                   HUGE_PAGE / static_cast<int64_t>(sizeof(float))));
  const int64_t rows = lesser<int64_t>(divide_up(task_pixels, BAND * volume.size[2]), volume.size[1]);
  const int64_t row_groups = divide_up(volume.size[1], rows), columns = TASK_PIXELS / BAND;
  const int64_t planes = lesser<int64_t>(divide_up(task_pixels, plane), volume.size[0]);
  const int64_t column_groups = divide_up(plane, columns), plane_groups = divide_up(volume.size[0], planes);

  const Step mark{volume.batch * bands * row_groups, [&](int64_t task, int) {
                    const int64_t band = task / row_groups, first = task % row_groups * rows;
                    with_width(meaning.width, [&](auto zero) {
                      using T = decltype(zero);
                      const T *image = static_cast<const T *>(volume.data) + band / bands * volume.stride_batch;
                      for (int64_t y = first; y < lesser<int64_t>(first + rows, volume.size[1]); ++y) {
                        const int64_t row = band * volume.size[1] + y, word = row * volume.size[2];
                        mark_words(volume, meaning, image, static_cast<int>(band % bands * BAND), static_cast<int>(y),
                                   words.sites + word, edges ? words.wanted + word : nullptr,
                                   words.pending + row * Words::groups(volume.size[2]));
                      }
                    });
                  }};
  const Step carry{words.carries ? volume.batch * column_groups : 0, [&](int64_t task, int) {
                     const int64_t word = task / column_groups * bands * plane, first = task % column_groups * columns;
                     carry_columns(words.sites + word, words.carries + word, bands, plane, first,
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
  share(threads_used, mark, carry, solve);
}

template <class Cost>
int64_t scratch_bytes(const Volume &volume, bool edges, int threads) {
  Scratch scratch(nullptr);
  Words(scratch, volume, edges);
  Apart<Cost>(scratch, volume.size[1]);
  Apart<Cost>(scratch, volume.size[2]);
  return scratch.used() + workers<Cost>(volume, threads, scratch.used()) * work_bytes<Cost>(volume);
}

int transform(const char *name, const ContextrastVolume &given, bool edges, const ContextrastDistance &wanted,
              void *memory, int threads, char *error) {
  if (const int code = check_volume(name, given, edges, error)) return code;
  if (const int code = check_wanted(wanted, edges, error)) return code;
  const Volume volume(given, wanted);
  if (volume.batch <= 0 || volume.image() == 0) return CONTEXTRAST_OK;
  use_huge_pages(volume);
  Scratch scratch(memory);
  if (volume.metric.integral)
    volume.has_keys() ? transform<true, int32_t>(volume, edges, scratch, threads)
                  : transform<false, int32_t>(volume, edges, scratch, threads);
  else
    volume.has_keys() ? transform<true, double>(volume, edges, scratch, threads)
                  : transform<false, double>(volume, edges, scratch, threads);
  return CONTEXTRAST_OK;
}

}  // namespace
}  // namespace contextrast

extern "C" {

// A call with invalid arguments needs no scratch, so its size is 0.
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
