// The arithmetic that csrc's CPU loops and CUDA kernels share, at the level of one lane, against the plainest loops. A
// warp is 32 lanes in a loop: ballots and reductions are loops over them. Ends with 0 and prints what it checked, or
// says what differs and ends with 1.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "errors.h"
#include "lines.h"
#include "ranks.h"

using namespace contextrast;

namespace {

constexpr int LANES = 32, BAND = 32, STEPS = 8;
long checked = 0;

#define CHECK(condition, ...)                         \
  do {                                                \
    ++checked;                                        \
    if (!(condition)) {                               \
      fprintf(stderr, "%s:%d: ", __FILE__, __LINE__); \
      fprintf(stderr, "%s; ", #condition);            \
      fprintf(stderr, __VA_ARGS__);                   \
      fprintf(stderr, "\n");                          \
      exit(1);                                        \
    }                                                 \
  } while (0)

// ---- Columns

void check_columns(const std::vector<bool> &seeds) {  // one column
  const int height = static_cast<int>(seeds.size()), bands = (height + BAND - 1) / BAND;
  std::vector<uint32_t> word(bands, 0), above(bands, NO_SEED), below(bands, NO_SEED);
  for (int y = 0; y < height; ++y) word[y / BAND] |= static_cast<uint32_t>(seeds[y]) << (y % BAND);
  for (int band = 1; band < bands; ++band) above[band] = pass_down(word[band - 1], above[band - 1]);
  for (int band = bands - 2; band >= 0; --band) below[band] = pass_up(word[band + 1], below[band + 1]);
  for (int y = 0; y < height; ++y) {
    int nearest = static_cast<int>(NO_SEED);
    for (int v = 0; v < height; ++v)
      if (seeds[v]) nearest = std::min(nearest, abs(v - y));
    const uint32_t carry = pack_carry(above[y / BAND], below[y / BAND]);
    CHECK(column_distance(word[y / BAND], y % BAND, carry) == static_cast<uint32_t>(nearest), "height %d row %d",
          height, y);
  }
}

// ---- Rows, as a warp solves them: the window in tiles of 32 pixels until all lanes have a proof, then anchors, each
// by 32 lanes over its columns, then the open tiles between their anchors.

std::vector<int32_t> plain_row(const std::vector<int32_t> &parabolas) {
  const int width = static_cast<int>(parabolas.size());
  std::vector<int32_t> best(width, INT32_MAX);
  for (int x = 0; x < width; ++x)
    for (int u = 0; u < width; ++u) best[x] = std::min(best[x], parabolas[u] - u * u + (x - u) * (x - u));
  return best;
}

int warp_anchor(const int32_t *parabolas, int x, int first, int last) {
  Candidate lanes[LANES];
  for (int lane = 0; lane < LANES; ++lane) lanes[lane] = lane_candidate(parabolas, x, first, last, lane, LANES);
  for (int offset = LANES / 2; offset; offset /= 2)  // a butterfly of shuffles
    for (int lane = 0; lane < LANES; ++lane) {
      const Candidate other = lanes[lane ^ offset], mine = better(lanes[lane], other);
      if ((lane & offset) == 0) lanes[lane] = mine;
    }
  return lanes[0].column;
}

std::vector<int32_t> warp_row(const std::vector<int32_t> &row, int steps, int *open_tiles) {
  const int width = static_cast<int>(row.size()), last = width - 1, tiles = segments(0, last, LANES);
  const int32_t *parabolas = row.data();
  std::vector<int32_t> best(width);
  std::vector<bool> open(tiles);
  for (int tile = 0; tile < tiles; ++tile) {
    const int start = anchor_column(0, last, LANES, tile), end = std::min(start + LANES, width);
    for (int x = start; x < end; ++x) best[x] = cost(parabolas, x, x);
    uint32_t unproven = ~0u;  // a ballot
    for (int k = 1; unproven; ++k) {
      unproven = 0;
      for (int x = start; x < end; ++x)
        unproven |= static_cast<uint32_t>(!window_is_proof(0, last, x, k, best[x])) << (x - start);
      if (k > steps) break;
      // A lane with a proof goes on with the others: more columns do no harm.
      for (int x = start; unproven && x < end; ++x) best[x] = widen(parabolas, 0, last, x, k, best[x]);
    }
    open[tile] = unproven != 0;
    *open_tiles += open[tile];
  }
  std::vector<int> column(tiles + 1);
  long candidates = 0;
  const auto solve = [&](int j, int from, int to) {
    CHECK(0 <= from && from <= to && to <= last, "anchor %d of %d: columns %d to %d", j, tiles, from, to);
    column[j] = warp_anchor(parabolas, anchor_column(0, last, LANES, j), from, to);
    candidates += to - from + 1;
  };
  solve(0, 0, last);
  solve(tiles, column[0], last);
  std::vector<int> solved(tiles + 1, 0);
  int levels = 2;
  for (int step = first_step(tiles); step; step /= 2, ++levels)
    for (int j = step; j < tiles; j += 2 * step)
      solve(j, column[j - step], column[std::min(j + step, tiles)]), ++solved[j];
  for (int j = 1; j < tiles; ++j) CHECK(solved[j] == 1, "anchor %d of %d solved %d times", j, tiles, solved[j]);
  CHECK(candidates <= levels * static_cast<long>(width + tiles), "%ld candidates in a row of %d", candidates, width);
  long swept = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    CHECK(column[tile] <= column[tile + 1], "anchors %d and %d cross", tile, tile + 1);
    swept += column[tile + 1] - column[tile] + 1;
    if (!open[tile]) continue;
    const int start = anchor_column(0, last, LANES, tile);
    for (int x = start; x < std::min(start + LANES, width); ++x)
      best[x] = least_cost(parabolas, x, column[tile], column[tile + 1]);
  }
  CHECK(swept <= width + tiles, "%ld columns swept in a row of %d", swept, width);
  return best;
}

void check_rows(std::mt19937 &random, int width, int largest, double absent) {
  std::vector<int32_t> parabolas(width);
  for (int u = 0; u < width; ++u) {
    const bool none = std::uniform_real_distribution<>()(random) < absent;
    const uint32_t g = none ? NO_SEED : std::uniform_int_distribution<uint32_t>(0, largest)(random);
    parabolas[u] = parabola(g, u);
  }
  const std::vector<int32_t> expected = plain_row(parabolas);
  int open_tiles = 0;
  for (int steps : {0, 1, STEPS, width}) {
    const std::vector<int32_t> best = warp_row(parabolas, steps, &open_tiles);
    for (int x = 0; x < width; ++x)
      CHECK(squared_distance(best[x]) == squared_distance(expected[x]), "width %d steps %d x %d: %d, not %d", width,
            steps, x, best[x], expected[x]);
  }
  for (int x = 0; x < width; ++x) {
    int32_t best;
    const bool proven = row_window(parabolas.data(), 0, width - 1, x, STEPS, best);
    CHECK(squared_distance(best) >= squared_distance(expected[x]), "width %d x %d", width, x);
    CHECK(!proven || squared_distance(best) == squared_distance(expected[x]), "width %d x %d", width, x);
  }
}

// ---- Ranks

void check_ranks(std::mt19937 &random) {
  const auto value = [](int64_t seed, uint32_t stream, uint32_t pixel) { return hash(pixel, hash_key(seed, stream)); };
  CHECK(value(0, 0, 0) == 0x4cb04c27 && value(0, 0, 1) == 0x671abcbb, "hash");
  CHECK(value(0, 0, 2) == 0x6b7d565f && value(0, 0, 65535) == 0xe21576e6, "hash");
  CHECK(value(-1, 0, 0) == 0x0bb48b84 && value((1LL << 40) + 5, 0, 0) == 0x86d95e7d, "hash of a wide seed");
  CHECK(value(0, 1, 0) == 0x8432b77c, "hash of another stream");
  std::vector<uint32_t> hashes(1 << 20);
  for (uint32_t pixel = 0; pixel < hashes.size(); ++pixel) hashes[pixel] = value(7, TIES, pixel);
  std::sort(hashes.begin(), hashes.end());
  CHECK(std::adjacent_find(hashes.begin(), hashes.end()) == hashes.end(), "two pixels with one hash");

  std::vector<int32_t> distances = {INT32_MIN, INT32_MIN + 1, -1, 0, 1, 2, INT32_MAX - 1, INT32_MAX};
  for (int bit = 1; bit < 31; ++bit)
    for (int d = -2; d <= 2; ++d) distances.push_back((1 << bit) + d);
  for (int i = 0; i < 20000; ++i) distances.push_back(static_cast<int32_t>(random()) >> (random() % 31));
  std::sort(distances.begin(), distances.end());
  for (size_t i = 0; i < distances.size(); ++i) {
    const int32_t d = distances[i];
    const int bin = bin_of(d);
    CHECK(0 <= bin && bin < BINS, "bin %d of %d", bin, d);
    CHECK(bin_start(bin) <= d && (bin == BINS - 1 || d < bin_start(bin + 1)), "bin %d of %d", bin, d);
    if (i == 0) continue;
    CHECK(bin_of(distances[i - 1]) <= bin, "bins of %d and %d", distances[i - 1], d);
    if (distances[i - 1] < d)
      CHECK(rank(distances[i - 1], ~0u) < rank(d, 0), "ranks of %d and %d", distances[i - 1], d);
    CHECK(rank(d, 5) < rank(d, 6), "ranks of %d", d);
  }
  for (int bin = 1; bin < BINS; ++bin)
    CHECK(bin_of(bin_start(bin)) == bin && bin_start(bin - 1) < bin_start(bin), "bin %d", bin);

  CHECK(quota(0.07, 100) == 8, "the product is rounded once");
  CHECK(quota(0.5, 3) == 2 && quota(0, 9) == 0 && quota(1e-9, 9) == 1 && quota(1, 9) == 9, "quota");
  CHECK(quota(7, 9) == 9 && quota(-1, 9) == 0 && quota(NAN, 9) == 0 && quota(INFINITY, 9) == 9 && quota(0.5, 0) == 0,
        "quota");
}

// ---- Errors

template <class Float, class Bits>
void check_order(std::mt19937 &random, Bits infinity) {
  const auto bits_of = [](Float value) {
    Bits bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
  };
  std::vector<Float> values = {
      0, -Float(0), 1, -1, Float(INFINITY), -Float(INFINITY), std::numeric_limits<Float>::denorm_min()};
  for (int i = 0; i < 300; ++i)
    values.push_back(static_cast<Float>(
        std::ldexp(static_cast<double>(random()) - 2147483648.0, static_cast<int>(random() % 80) - 60)));
  for (const Float a : values) {
    for (const Float b : values)
      CHECK((order_key(bits_of(a), infinity) < order_key(bits_of(b), infinity)) == (a < b), "%g %g", double(a),
            double(b));
    for (const Float nan : {Float(NAN), -Float(NAN)})
      CHECK(order_key(bits_of(nan), infinity) > order_key(bits_of(a), infinity), "%g", double(a));
  }
}

void check_errors(std::mt19937 &random) {
  check_order<float>(random, INFINITY_FLOAT32);
  check_order<double>(random, INFINITY_FLOAT64);
  const uint64_t any = class_limit(-1, 0);
  CHECK(class_limit(-1, 19) == 19 && class_limit(5, 0) == 5, "limit");
  CHECK(target_of(255, 19, 255) == NO_CLASS && target_of(18, 19, 255) == 18 && target_of(19, 19, 255) == NO_CLASS,
        "target");
  CHECK(target_of(INT64_MIN, any, 255) == NO_CLASS && target_of(INT64_MAX, any, 255) == LARGE_CLASS, "target");
  CHECK(prediction_of(INT64_MAX, any, 255) == NO_CLASS && prediction_of(INT32_MAX, any, 255) == INT32_MAX,
        "prediction");
  CHECK(prediction_of(2, 19, 2) == NO_CLASS && prediction_of(2, 19, 3) == 2, "prediction that is ignore_index");
  CHECK(error_class(3, 3) == NO_CLASS && error_class(3, 4) == 4 && error_class(NO_CLASS, 4) == NO_CLASS, "error");
  CHECK(error_class(LARGE_CLASS, 4) == 4 && error_class(3, NO_CLASS) == NO_CLASS, "error");
  for (int from : {1, 2, 5, 16384})
    for (int to : {1, 3, 5, 16384})
      for (int i = 0; i < to; ++i)
        CHECK(sample(i, from, to) == static_cast<int64_t>(i) * from / to && sample(i, from, to) < from, "sample");
}

}  // namespace

int main() {
  std::mt19937 random(20240);
  for (int height : {1, 2, 31, 32, 33, 63, 64, 65, 96, 97, 130})
    for (double density : {0.0, 0.01, 0.1, 0.5, 1.0})
      for (int repeat = 0; repeat < 5; ++repeat) {
        std::vector<bool> seeds(height);
        for (int y = 0; y < height; ++y) seeds[y] = std::uniform_real_distribution<>()(random) < density;
        check_columns(seeds);
      }
  for (int width : {1, 2, 3, 31, 32, 33, 63, 64, 65, 96, 97, 127, 128, 129, 257, 400})
    for (int largest : {0, 1, 3, 20, 500, CONTEXTRAST_MAX_SIDE - 1})
      for (double absent : {0.0, 0.5, 0.95, 1.0}) check_rows(random, width, largest, absent);
  check_rows(random, CONTEXTRAST_MAX_SIDE / 4, CONTEXTRAST_MAX_SIDE - 1, 0.999);
  check_ranks(random);
  check_errors(random);
  printf("%ld checks\n", checked);
}
