// edge_distance and distance_transform on the CPU, in three passes over bands of 32 rows; a band is a task for a
// thread.
//   1. mark: the seeds, and the results of all pixels that are seeds or have no distance. The others are `far`.
//   2. carry: the nearest seeds above and below each band.
//   3. solve: the far pixels, run by run. Both neighbours of a run are seeds (or the image ends there), so no column
//      beyond them matters.
#include <string.h>

#include "host.h"
#include "lines.h"

namespace contextrast {
namespace {

constexpr int BAND = 32;
constexpr int WINDOW = 4;    // steps of the window before a segment is left to the bisection
constexpr int SEGMENT = 32;  // pixels: a small multiple of the lanes of a vector register
constexpr int SEGMENTS = CONTEXTRAST_MAX_SIDE / SEGMENT + 1;

struct Bands {
  int64_t count;
  uint32_t *seeds, *carries;  // (B, count, W)
  uint8_t *far;               // (B, H, W)

  Bands(Scratch &scratch, int64_t batch, int64_t height, int64_t width) : count((height + BAND - 1) / BAND) {
    seeds = scratch.take<uint32_t>(batch * count * width);
    carries = scratch.take<uint32_t>(batch * count * width);
    far = scratch.take<uint8_t>(batch * height * width);
  }
};

// What the two functions differ in: the seeds, the pixels whose distance is wanted, and what the others get.

struct Edges {
  static constexpr int UNWANTED = CONTEXTRAST_OUTSIDE;
  template <class T>
  static CONTEXTRAST_HD bool is_seed(T here, T up, T down, T left, T right) {
    return is_edge(here, up, down, left, right);
  }
  template <class T>
  static CONTEXTRAST_HD bool is_wanted(T here) {
    return here >= T(0);
  }
};

struct Zeros {
  static constexpr int UNWANTED = 0;
  template <class T>
  static CONTEXTRAST_HD bool is_seed(T here, T, T, T, T) {
    return here == T(0);
  }
  template <class T>
  static CONTEXTRAST_HD bool is_wanted(T here) {
    return here != T(0);
  }
};

// ---- 1. Mark

template <class Kind, class T, class Distance>
CONTEXTRAST_HD void mark(T here, T up, T down, T left, T right, int bit, uint32_t &seeds, uint8_t &far,
                         Distance &distance) {
  const bool seed = Kind::is_seed(here, up, down, left, right), wanted = Kind::is_wanted(here);
  seeds |= static_cast<uint32_t>(seed) << bit;
  far = wanted & !seed;
  distance = wanted ? Distance(0) : Distance(Kind::UNWANTED);
}

// One row, whose columns lie `step` elements apart.
template <class Kind, class T, class Distance>
CONTEXTRAST_HD void mark_row(const T *__restrict here, const T *__restrict up, const T *__restrict down, int64_t step,
                             int width, int bit, uint32_t *__restrict seeds, uint8_t *__restrict far,
                             Distance *__restrict distance) {
  const int64_t last = width - 1;
  for (int64_t x = 1; x < last; ++x)
    mark<Kind>(here[x * step], up[x * step], down[x * step], here[(x - 1) * step], here[(x + 1) * step], bit, seeds[x],
               far[x], distance[x]);
  for (const int64_t x : {int64_t(0), last}) {
    const int64_t left = greater<int64_t>(x - 1, 0), right = lesser(x + 1, last);
    mark<Kind>(here[x * step], up[x * step], down[x * step], here[left * step], here[right * step], bit, seeds[x],
               far[x], distance[x]);
  }
}

template <class Kind, class T, class Distance>
CONTEXTRAST_CLONES void mark_band(const T *image, int64_t stride_row, int64_t stride_column, int height, int width,
                                  int top, uint32_t *seeds, uint8_t *far, Distance *distance) {
  memset(seeds, 0, static_cast<size_t>(width) * sizeof *seeds);
  for (int y = top; y < lesser(top + BAND, height); ++y, far += width, distance += width) {
    const T *here = image + y * stride_row, *up = y > 0 ? here - stride_row : here,
            *down = y + 1 < height ? here + stride_row : here;
    if (stride_column == 1)
      mark_row<Kind>(here, up, down, 1, width, y - top, seeds, far, distance);
    else
      mark_row<Kind>(here, up, down, stride_column, width, y - top, seeds, far, distance);
  }
}

// ---- 2. Carry

CONTEXTRAST_CLONES void carry_image(const uint32_t *seeds, uint32_t *carries, int64_t count, int width) {
  for (int x = 0; x < width; ++x) carries[x] = pack_carry(NO_SEED, 0);
  for (int64_t band = 1; band < count; ++band) {
    const uint32_t *word = seeds + (band - 1) * width, *from = carries + (band - 1) * width;
    uint32_t *to = carries + band * width;
    for (int x = 0; x < width; ++x) to[x] = pack_carry(pass_down(word[x], carry_above(from[x])), 0);
  }
  for (int x = 0; x < width; ++x) carries[(count - 1) * width + x] |= pack_carry(0, NO_SEED);
  for (int64_t band = count - 2; band >= 0; --band) {
    const uint32_t *word = seeds + (band + 1) * width, *from = carries + (band + 1) * width;
    uint32_t *to = carries + band * width;
    for (int x = 0; x < width; ++x) to[x] |= pack_carry(0, pass_up(word[x], carry_below(from[x])));
  }
}

// ---- 3. Solve

CONTEXTRAST_HD void write(int32_t best, int32_t &distance) { distance = squared_distance(best); }
CONTEXTRAST_HD void write(int32_t best, float &distance) { distance = distance_of(squared_distance(best)); }

// The column of least cost for pixel x.
CONTEXTRAST_HD int best_column(const int32_t *parabolas, int x, int first, int last) {
  int32_t best = INT32_MAX;
  for (int u = first; u <= last; ++u) best = lesser(best, cost(parabolas, x, u));
  int u = first;
  while (cost(parabolas, x, u) != best) ++u;
  return u;
}

// best[i] = least_cost of pixel x + i over the columns first..last, for a segment of pixels abreast.
CONTEXTRAST_HD void least_costs(const int32_t *parabolas, int x, int first, int last, int32_t *best) {
  int32_t lowest[SEGMENT], linear[SEGMENT];
  for (int i = 0; i < SEGMENT; ++i) {
    lowest[i] = INT32_MAX;
    linear[i] = -2 * (x + i) * first;
  }
  for (int u = first; u <= last; ++u)
    for (int i = 0; i < SEGMENT; ++i) {
      lowest[i] = lesser(lowest[i], parabolas[u] + linear[i]);
      linear[i] -= 2 * (x + i);
    }
  for (int i = 0; i < SEGMENT; ++i) best[i] = lowest[i] + (x + i) * (x + i);
}

// What the window leaves open: the segments marked hard, by bisection over the columns first..last. May write SEGMENT
// entries beyond last.
CONTEXTRAST_HD void bisect(const int32_t *parabolas, int first, int last, const bool *hard, int32_t *best) {
  int column[SEGMENTS + 1];  // of each anchor
  const int count = segments(first, last, SEGMENT);
  const auto solve = [&](int j, int from, int to) {
    column[j] = best_column(parabolas, anchor_column(first, last, SEGMENT, j), from, to);
  };
  solve(0, first, last);
  solve(count, column[0], last);
  for (int step = first_step(count); step; step /= 2)
    for (int j = step; j < count; j += 2 * step) solve(j, column[j - step], column[lesser(j + step, count)]);
  for (int j = 0; j < count; ++j)
    if (hard[j]) least_costs(parabolas, first + j * SEGMENT, column[j], column[j + 1], best + first + j * SEGMENT);
}

template <class Distance>
CONTEXTRAST_CLONES void solve_band(const uint32_t *seeds, const uint32_t *carries, const uint8_t *far, int width,
                                   int rows, Distance *distance) {
  int32_t parabolas[CONTEXTRAST_MAX_SIDE], best[CONTEXTRAST_MAX_SIDE + SEGMENT];
  bool hard[SEGMENTS];
  for (int row = 0; row < rows; ++row, far += width, distance += width) {
    for (int end = 0; end < width;) {
      const void *run = memchr(far + end, 1, static_cast<size_t>(width - end));
      if (!run) break;
      const int start = static_cast<int>(static_cast<const uint8_t *>(run) - far);
      const void *stop = memchr(far + start, 0, static_cast<size_t>(width - start));
      end = stop ? static_cast<int>(static_cast<const uint8_t *>(stop) - far) : width;

      const int first = greater(start - 1, 0), last = lesser(end, width - 1);  // the columns that matter
      for (int u = first; u <= last; ++u) parabolas[u] = parabola(column_distance(seeds[u], row, carries[u]), u);
      bool any_hard = false;
      for (int x = start; x < end; ++x) {
        if (row_window(parabolas, first, last, x, WINDOW, best[x])) continue;
        if (!any_hard) memset(hard, 0, sizeof hard);
        const int segment = (x - first) / SEGMENT;
        any_hard = hard[segment] = true;
        x = first + (segment + 1) * SEGMENT - 1;  // its other pixels will be no easier
      }
      if (any_hard) bisect(parabolas, first, last, hard, best);
      for (int x = start; x < end; ++x) write(best[x], distance[x]);
    }
  }
}

template <class Kind, class Distance>
int transform(const char *name, const ContextrastMap &map, Distance *distance, void *memory, int threads, char *error) {
  if (const int code = check_integer_map(name, map, error)) return code;
  const int height = static_cast<int>(map.height), width = static_cast<int>(map.width);
  const int64_t pixels = map.height * map.width;
  if (map.batch <= 0 || pixels == 0) return CONTEXTRAST_OK;
  Scratch scratch(memory);
  const Bands bands(scratch, map.batch, height, width);
  const int64_t all_bands = map.batch * bands.count;

  const Step mark{all_bands, [&](int64_t band, int) {
                    const int64_t image = band / bands.count, top = band % bands.count * BAND;
                    const int64_t start = image * pixels + top * width;
                    with_integer(map.type, [&](auto zero) {
                      using T = decltype(zero);
                      mark_band<Kind>(static_cast<const T *>(map.data) + image * map.stride_batch, map.stride_row,
                                      map.stride_column, height, width, static_cast<int>(top),
                                      bands.seeds + band * width, bands.far + start, distance + start);
                    });
                  }};
  const Step carry{map.batch, [&](int64_t image, int) {
                     const int64_t start = image * bands.count * width;
                     carry_image(bands.seeds + start, bands.carries + start, bands.count, width);
                   }};
  const Step solve{all_bands, [&](int64_t band, int) {
                     const int64_t image = band / bands.count, top = band % bands.count * BAND;
                     const int64_t start = image * pixels + top * width;
                     solve_band(bands.seeds + band * width, bands.carries + band * width, bands.far + start, width,
                                lesser(BAND, static_cast<int>(height - top)), distance + start);
                   }};
  share(threads_for(threads, map.batch * pixels), mark, carry, solve);
  return CONTEXTRAST_OK;
}

template <class Kind>
int transform(const char *name, const ContextrastMap &map, int squared, void *distance, void *scratch, int threads,
              char *error) {
  return squared ? transform<Kind>(name, map, static_cast<int32_t *>(distance), scratch, threads, error)
                 : transform<Kind>(name, map, static_cast<float *>(distance), scratch, threads, error);
}

}  // namespace
}  // namespace contextrast

extern "C" {

int64_t contextrast_edge_distance_scratch_cpu(int64_t batch, int64_t height, int64_t width, int) {
  contextrast::Scratch scratch(nullptr);
  contextrast::Bands(scratch, batch, height, width);
  return scratch.used();
}

int contextrast_edge_distance_cpu(const ContextrastMap *classes, int squared, void *distance, void *scratch,
                                  int threads, char *error) {
  return contextrast::transform<contextrast::Edges>("classes", *classes, squared, distance, scratch, threads, error);
}

int contextrast_distance_transform_cpu(const ContextrastMap *mask, int squared, void *distance, void *scratch,
                                       int threads, char *error) {
  return contextrast::transform<contextrast::Zeros>("mask", *mask, squared, distance, scratch, threads, error);
}

}  // extern "C"
