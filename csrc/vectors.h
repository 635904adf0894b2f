// Vectors of 32 bytes, blocks of two of them, and the best candidates of a block.
#ifndef CONTEXTRAST_VECTORS_H
#define CONTEXTRAST_VECTORS_H

#include "lines.h"

namespace contextrast {
namespace {

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

  // Whether a site at the cost `next` away could still improve the block. With KEYS a candidate of equal cost and
  // smaller key improves it too.
  CONTEXTRAST_HD bool is_open(Cost next) const {
    const auto worst = most(costs.a, costs.b);
    if constexpr (KEYS)
      return any(worst >= next);
    else
      return any(worst > next);
  }
};

}  // namespace
}  // namespace contextrast
#endif
