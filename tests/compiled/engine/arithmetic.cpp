// Integer and floating-point arithmetic, comparisons and selections.
#include "machine.h"

// ----------------------------------------------------------------------------------------------------------- integers

template <class T>
T shifted_left(T x, u32 by) { return by >= 8 * sizeof(T) ? 0 : T(x << by); }
template <class T>
T shifted_right(T x, u32 by) {
  const u32 most = 8 * sizeof(T) - 1;
  if (by > most) return std::is_signed_v<T> ? T(x >> most) : 0;
  return T(x >> by);
}

template <class U, class S>
void define_integers(const std::string& bits) {
  const std::string u = ".u" + bits, s = ".s" + bits;
  elementwise<U, U, U>("add" + u, [](U x, U y) { return U(x + y); });
  elementwise<U, U, U>("sub" + u, [](U x, U y) { return U(x - y); });
  elementwise<U, U, U>("mul.lo" + u, [](U x, U y) { return U(u64(x) * u64(y)); });
  elementwise<U, U, U, U>("mad.lo" + u, [](U x, U y, U z) { return U(u64(x) * u64(y) + z); });
  elementwise<U, U, U>("and" + u, [](U x, U y) { return U(x & y); });
  elementwise<U, U, U>("or" + u, [](U x, U y) { return U(x | y); });
  elementwise<U, U, U>("xor" + u, [](U x, U y) { return U(x ^ y); });
  elementwise<U, U>("not" + u, [](U x) { return U(~x); });
  elementwise<U, U>("neg" + s, [](U x) { return U(0 - x); });
  elementwise<U, S>("abs" + s, [](S x) { return x < 0 ? U(0 - U(x)) : U(x); });
  elementwise<U, U, u32>("shl" + u, [](U x, u32 y) { return shifted_left<U>(x, y); });
  elementwise<U, U, u32>("shr" + u, [](U x, u32 y) { return shifted_right<U>(x, y); });
  elementwise<S, S, u32>("shr" + s, [](S x, u32 y) { return shifted_right<S>(x, y); });
  elementwise<U, U, U>("min" + u, [](U x, U y) { return std::min(x, y); });
  elementwise<U, U, U>("max" + u, [](U x, U y) { return std::max(x, y); });
  elementwise<S, S, S>("min" + s, [](S x, S y) { return std::min(x, y); });
  elementwise<S, S, S>("max" + s, [](S x, S y) { return std::max(x, y); });
}

// Products of twice the width, and their upper half.
template <class T, class Wide>
void define_wide_products(const std::string& type) {
  elementwise<Wide, T, T>("mul.wide." + type, [](T x, T y) { return Wide(Wide(x) * Wide(y)); });
  elementwise<Wide, T, T, Wide>("mad.wide." + type, [](T x, T y, Wide z) { return Wide(u64(Wide(x) * Wide(y)) + u64(z)); });
}

// The guard's lanes may not divide by zero: PTX leaves the result open.
template <class T, bool remainder>
void divide(Context& c) {
  const T *x = c.reg<T>(1), *y = c.reg<T>(2);
  T results[32];
  for (int lane = 0; lane < 32; lane++) {
    if (y[lane] == 0) {
      results[lane] = remainder ? x[lane] : T(-1);
      if (c.active(lane)) c.report(DIVISION_BY_ZERO, lane, 0);
    } else if (std::is_signed_v<T> && y[lane] == T(-1)) {
      results[lane] = remainder ? T(0) : T(0 - u64(x[lane]));
    } else {
      results[lane] = remainder ? T(x[lane] % y[lane]) : T(x[lane] / y[lane]);
    }
  }
  c.write(0, results);
  c.set_undefined(0, c.undefined(1) | c.undefined(2));
}
template <class T>
void define_division(const std::string& type) {
  define("div." + type, divide<T, false>);
  define("rem." + type, divide<T, true>);
}

template <class U, class S, bool is_signed>
U extract_bits(U x, u32 position, u32 length) {
  constexpr u32 bits = 8 * sizeof(U);
  position &= 255, length &= 255;
  if (!length) return 0;
  const bool sign = is_signed && (x >> std::min(position + length - 1, bits - 1) & 1);
  const U shifted = position >= bits ? U(sign ? ~U(0) : 0) : is_signed ? U(S(x) >> position) : U(x >> position);
  if (length >= bits || position + length > bits) return shifted;
  const U kept = (U(1) << length) - 1;
  return sign ? shifted | ~kept : shifted & kept;
}

template <class T>
T insert_bits(T from, T into, u32 position, u32 length) {
  using Wide = unsigned __int128;
  const u32 bits = 8 * sizeof(T);
  position = std::min(position & 255, bits), length = std::min(length & 255, bits);
  const Wide field = ((Wide(1) << length) - 1) << position;
  return T((into & ~field) | ((Wide(from) << position) & field));
}

u32 permute_bytes(u32 low, u32 high, u32 selector) {
  const u64 bytes = u64(high) << 32 | low;
  u32 result = 0;
  for (int k = 0; k < 4; k++) {
    const u32 nibble = selector >> 4 * k & 15;
    u32 byte = bytes >> 8 * (nibble & 7) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * k;
  }
  return result;
}
// Each half of the result is as defined as the halves that its two bytes come from.
void permute(Context& c) {
  const u32 sources[4] = {c.undefined_low(1), c.undefined_high(1), c.undefined_low(2), c.undefined_high(2)};
  u32 results[32], low = c.undefined(3), high = low;
  for (int lane = 0; lane < 32; lane++) {
    const u32 selector = c.reg<u32>(3)[lane];
    results[lane] = permute_bytes(c.reg<u32>(1)[lane], c.reg<u32>(2)[lane], selector);
    for (int k = 0; k < 4; k++) (k < 2 ? low : high) |= sources[(selector >> 4 * k & 7) / 2] & 1u << lane;
  }
  c.write(0, results);
  c.set_undefined(0, low, high);
}

u32 reversed(u32 x) {
  u32 result = 0;
  for (int k = 0; k < 32; k++) result |= (x >> k & 1) << (31 - k);
  return result;
}

// numbers[0]: the truth table.
void logic3(Context& c) {
  const u32 *a = c.reg<u32>(1), *b = c.reg<u32>(2), *d = c.reg<u32>(3);
  u32 results[32];
  for (int lane = 0; lane < 32; lane++) {
    results[lane] = 0;
    for (int k = 0; k < 8; k++)
      if (c.number(0) >> k & 1)
        results[lane] |= (k & 4 ? a[lane] : ~a[lane]) & (k & 2 ? b[lane] : ~b[lane]) & (k & 1 ? d[lane] : ~d[lane]);
  }
  c.write(0, results);
  c.set_undefined(0, c.undefined(1) | c.undefined(2) | c.undefined(3));
}

void define_all_integers() {
  define_integers<u16, s16>("16");
  define_integers<u32, s32>("32");
  define_integers<u64, s64>("64");
  define_wide_products<s16, s32>("s16");
  define_wide_products<u16, u32>("u16");
  define_wide_products<s32, s64>("s32");
  define_wide_products<u32, u64>("u32");
  elementwise<u32, s32, s32>("mul.hi.s32", [](s32 x, s32 y) { return u32((s64(x) * y) >> 32); });
  elementwise<u32, u32, u32>("mul.hi.u32", [](u32 x, u32 y) { return u32((u64(x) * y) >> 32); });
  elementwise<u64, s64, s64>("mul.hi.s64", [](s64 x, s64 y) { return u64(((__int128)x * y) >> 64); });
  elementwise<u64, u64, u64>("mul.hi.u64", [](u64 x, u64 y) { return u64(((unsigned __int128)x * y) >> 64); });
  define_division<s16>("s16"), define_division<u16>("u16"), define_division<s32>("s32");
  define_division<u32>("u32"), define_division<s64>("s64"), define_division<u64>("u64");
  elementwise<u32, u32>("popc.u32", [](u32 x) { return u32(__builtin_popcount(x)); });
  elementwise<u32, u64>("popc.u64", [](u64 x) { return u32(__builtin_popcountll(x)); });
  elementwise<u32, u32>("clz.u32", [](u32 x) { return x ? u32(__builtin_clz(x)) : 32u; });
  elementwise<u32, u64>("clz.u64", [](u64 x) { return x ? u32(__builtin_clzll(x)) : 64u; });
  elementwise<u32, u32>("brev.u32", [](u32 x) { return reversed(x); });
  elementwise<u32, u32>("bfind.shiftamt.u32", [](u32 x) { return x ? u32(__builtin_clz(x)) : ~0u; });
  elementwise<u32, u32>("bfind.u32", [](u32 x) { return x ? 31u - __builtin_clz(x) : ~0u; });
  elementwise<u32, u32, u32, u32>("bfe.u32", [](u32 x, u32 p, u32 n) { return extract_bits<u32, s32, false>(x, p, n); });
  elementwise<u32, u32, u32, u32>("bfe.s32", [](u32 x, u32 p, u32 n) { return extract_bits<u32, s32, true>(x, p, n); });
  elementwise<u64, u64, u32, u32>("bfe.u64", [](u64 x, u32 p, u32 n) { return extract_bits<u64, s64, false>(x, p, n); });
  elementwise<u64, u64, u32, u32>("bfe.s64", [](u64 x, u32 p, u32 n) { return extract_bits<u64, s64, true>(x, p, n); });
  elementwise<u32, u32, u32, u32, u32>("bfi.u32", [](u32 x, u32 y, u32 p, u32 n) { return insert_bits(x, y, p, n); });
  elementwise<u64, u64, u64, u32, u32>("bfi.u64", [](u64 x, u64 y, u32 p, u32 n) { return insert_bits(x, y, p, n); });
  define("prmt.u32", permute, 4);
  elementwise<u32, u32, u32, u32>(
      "shf.l.wrap.u32", [](u32 x, u32 y, u32 z) { return u32(((u64(y) << 32 | x) << (z & 31)) >> 32); });
  elementwise<u32, u32, u32, u32>(
      "shf.r.wrap.u32", [](u32 x, u32 y, u32 z) { return u32((u64(y) << 32 | x) >> (z & 31)); });
  define("lop3.u32", logic3);
}

// ----------------------------------------------------------------------------------------------------- floating point

// Approximate instructions are correctly rounded, or, with noise, off by up to `relative`, which is what PTX promises.
// The same result is off by the same amount everywhere. The machine runs one launch at a time.
static bool noise;
static u64 noise_seed;
void set_noise(bool on, u64 seed) { noise = on, noise_seed = seed; }
static float approximate(float x, double relative) {
  if (!noise || !std::isfinite(x)) return canonical(x);
  u64 hash = (bits_of(x) + noise_seed) * 0x9E3779B97F4A7C15ull;
  hash = (hash ^ hash >> 29) * 0xBF58476D1CE4E5B9ull;
  return float(double(x) * (1 + double(s64(hash ^ hash >> 32)) * 0x1p-63 * relative));
}

template <class T>
void define_floats(const std::string& type) {
  elementwise<T, T, T>("add" + type, [](T x, T y) { return canonical(x + y); });
  elementwise<T, T, T>("sub" + type, [](T x, T y) { return canonical(x - y); });
  elementwise<T, T, T>("mul" + type, [](T x, T y) { return canonical(x * y); });
  elementwise<T, T, T, T>("fma" + type, [](T x, T y, T z) { return canonical(std::fma(x, y, z)); });
  elementwise<T, T, T>("div.rn" + type, [](T x, T y) { return canonical(x / y); });
  elementwise<T, T>("rcp.rn" + type, [](T x) { return canonical(T(1) / x); });
  elementwise<T, T>("sqrt.rn" + type, [](T x) { return canonical(std::sqrt(x)); });
  elementwise<T, T, T>("min" + type, [](T x, T y) { return minimum(x, y); });
  elementwise<T, T, T>("max" + type, [](T x, T y) { return maximum(x, y); });
  // Blackwell's forms with three numbers.
  elementwise<T, T, T, T>("min3" + type, [](T x, T y, T z) { return minimum(minimum(x, y), z); });
  elementwise<T, T, T, T>("max3" + type, [](T x, T y, T z) { return maximum(maximum(x, y), z); });
  // Signs are bits: a NaN keeps its own.
  using U = std::conditional_t<sizeof(T) == 4, u32, u64>;
  elementwise<U, U>("abs" + type, [](U x) { return U(x & ~(U(1) << (8 * sizeof(U) - 1))); });
  elementwise<U, U>("neg" + type, [](U x) { return U(x ^ U(1) << (8 * sizeof(U) - 1)); });
  elementwise<U, U, U>("copysign" + type, [](U x, U y) {
    constexpr U sign = U(1) << (8 * sizeof(U) - 1);
    return U((x & sign) | (y & ~sign));
  });
}

void define_float32_only() {
  using F = float;
  elementwise<F, F, F>("add.ftz.f32", [](F x, F y) { return canonical(flush(flush(x) + flush(y))); });
  elementwise<F, F, F>("sub.ftz.f32", [](F x, F y) { return canonical(flush(flush(x) - flush(y))); });
  elementwise<F, F, F>("mul.ftz.f32", [](F x, F y) { return canonical(flush(flush(x) * flush(y))); });
  elementwise<F, F, F, F>("fma.ftz.f32", [](F x, F y, F z) { return canonical(flush(std::fma(flush(x), flush(y), flush(z)))); });
  elementwise<F, F, F>("min.ftz.f32", [](F x, F y) { return minimum(flush(x), flush(y)); });
  elementwise<F, F, F>("max.ftz.f32", [](F x, F y) { return maximum(flush(x), flush(y)); });
  elementwise<F, F, F>("min.NaN.f32", [](F x, F y) { return x != x || y != y ? as_float(0x7fffffff) : minimum(x, y); });
  elementwise<F, F, F>("max.NaN.f32", [](F x, F y) { return x != x || y != y ? as_float(0x7fffffff) : maximum(x, y); });
  elementwise<F, F>("abs.ftz.f32", [](F x) { return flush(std::fabs(x)); });
  elementwise<F, F>("neg.ftz.f32", [](F x) { return flush(-x); });

  elementwise<F, F, F>("div.full.f32", [](F x, F y) { return approximate(x / y, 0x1p-22); });
  elementwise<F, F, F>("div.approx.f32", [](F x, F y) { return approximate(x / y, 0x1p-22); });
  elementwise<F, F, F>("div.full.ftz.f32", [](F x, F y) { return approximate(flush(flush(x) / flush(y)), 0x1p-22); });
  elementwise<F, F, F>("div.approx.ftz.f32", [](F x, F y) { return approximate(flush(flush(x) / flush(y)), 0x1p-22); });
  elementwise<F, F>("ex2.approx.f32", [](F x) { return approximate(float(std::exp2(double(x))), 0x1p-22); });
  elementwise<F, F>("ex2.approx.ftz.f32", [](F x) { return approximate(flush(float(std::exp2(double(flush(x))))), 0x1p-22); });
  elementwise<F, F>("lg2.approx.f32", [](F x) { return approximate(float(std::log2(double(x))), 0x1p-22); });
  elementwise<F, F>("lg2.approx.ftz.f32", [](F x) { return approximate(flush(float(std::log2(double(flush(x))))), 0x1p-22); });
  elementwise<F, F>("rcp.approx.f32", [](F x) { return approximate(1.f / x, 0x1p-23); });
  elementwise<F, F>("rcp.approx.ftz.f32", [](F x) { return approximate(flush(1.f / flush(x)), 0x1p-23); });
  elementwise<F, F>("sqrt.approx.f32", [](F x) { return approximate(std::sqrt(x), 0x1p-22); });
  elementwise<F, F>("sqrt.approx.ftz.f32", [](F x) { return approximate(std::sqrt(flush(x)), 0x1p-22); });
  elementwise<F, F>("rsqrt.approx.f32", [](F x) { return approximate(float(1 / std::sqrt(double(x))), 0x1p-22); });
  elementwise<F, F>("rsqrt.approx.ftz.f32", [](F x) { return approximate(float(1 / std::sqrt(double(flush(x)))), 0x1p-22); });
  elementwise<F, F>("tanh.approx.f32", [](F x) { return approximate(std::tanh(x), 0x1p-11); });
}

void define_float64_only() {
  // The approximations see and give the upper 32 bits alone.
  static constexpr auto upper = [](double x) { return as_double(bits_of(x) & 0xffffffff00000000ull); };
  elementwise<double, double>("rcp.approx.ftz.f64", [](double x) { return upper(flush(1 / flush(upper(x)))); });
  elementwise<double, double>("rsqrt.approx.ftz.f64", [](double x) { return upper(flush(1 / std::sqrt(flush(upper(x))))); });
  elementwise<double, double>("rsqrt.approx.f64", [](double x) { return 1 / std::sqrt(x); });
}

// Numbers of 16 bits: every operation is that of float64, rounded once.
template <class T>
void define_halves(const std::string& type) {
  static constexpr auto wide = [](T x) { return double(widen(x)); };
  elementwise<T, T, T>("add" + type, [](T x, T y) { return narrow<T>(wide(x) + wide(y)); });
  elementwise<T, T, T>("sub" + type, [](T x, T y) { return narrow<T>(wide(x) - wide(y)); });
  elementwise<T, T, T>("mul" + type, [](T x, T y) { return narrow<T>(wide(x) * wide(y)); });
  elementwise<T, T, T, T>("fma" + type, [](T x, T y, T z) { return narrow<T>(std::fma(wide(x), wide(y), wide(z))); });
  elementwise<T, T, T>("min" + type, [](T x, T y) { return narrow<T>(minimum(wide(x), wide(y))); });
  elementwise<T, T, T>("max" + type, [](T x, T y) { return narrow<T>(maximum(wide(x), wide(y))); });
  elementwise<u16, u16>("abs" + type, [](u16 x) { return u16(x & 0x7fff); });
  elementwise<u16, u16>("neg" + type, [](u16 x) { return u16(x ^ 0x8000); });
  elementwise<u32, u32>("abs" + type + "x2", [](u32 x) { return x & 0x7fff7fffu; });
  elementwise<u32, u32>("neg" + type + "x2", [](u32 x) { return x ^ 0x80008000u; });
  // Blackwell's sums of mixed precision.
  elementwise<float, T, float>("add.f32" + type, [](T x, float y) { return canonical(widen(x) + y); });
  elementwise<float, T, float>("sub.f32" + type, [](T x, float y) { return canonical(widen(x) - y); });
  elementwise<float, T, T, float>("fma.f32" + type, [](T x, T y, float z) { return canonical(std::fma(widen(x), widen(y), z)); });
}

// Blackwell's pairs of float32 in one register of 64 bits.
void define_pairs() {
  static constexpr auto low = [](u64 x) { return as_float(u32(x)); };
  static constexpr auto high = [](u64 x) { return as_float(u32(x >> 32)); };
  static constexpr auto pair = [](float l, float h) { return u64(bits_of(canonical(h))) << 32 | bits_of(canonical(l)); };
  halfwise<u64, 2>("add.f32x2", [](u64 x, u64 y) { return pair(low(x) + low(y), high(x) + high(y)); });
  halfwise<u64, 2>("sub.f32x2", [](u64 x, u64 y) { return pair(low(x) - low(y), high(x) - high(y)); });
  halfwise<u64, 2>("mul.f32x2", [](u64 x, u64 y) { return pair(low(x) * low(y), high(x) * high(y)); });
  halfwise<u64, 3>("fma.f32x2", [](u64 x, u64 y, u64 z) {
    return pair(std::fma(low(x), low(y), low(z)), std::fma(high(x), high(y), high(z)));
  });
}

// -------------------------------------------------------------------------------------------- comparisons, selections

// Operands: predicate, x, y[, predicate to combine with][, inverse].
// numbers: how to combine (0 not, 1 and, 2 or, 3 xor), that predicate negated, an inverse is wanted.
template <class Function, class T>
void compare(Context& c) {
  const T *x = c.reg<T>(1), *y = c.reg<T>(2);
  u32 result = 0, undefined = c.undefined(1) | c.undefined(2);
  for (int lane = 0; lane < 32; lane++) result |= u32(bool(Function()(x[lane], y[lane]))) << lane;
  u32 inverse = ~result;
  int next = 3;
  if (const int combine = c.number(0)) {
    const u32 other = c.number(1) ? ~c.predicate(next) : c.predicate(next);
    for (u32* value : {&result, &inverse}) *value = combine == 1 ? *value & other : combine == 2 ? *value | other : *value ^ other;
    undefined |= c.undefined(next++);
  }
  c.write_predicate(0, result);
  c.set_undefined(0, undefined);
  if (c.number(2)) {
    c.write_predicate(next, inverse);
    c.set_undefined(next, undefined);
  }
}
template <class T, class Function>
void comparison(const std::string& name, Function) { define("setp." + name, compare<Function, T>); }

template <class T>
void define_order(const std::string& type) {
  comparison<T>("lt" + type, [](T x, T y) { return x < y; });
  comparison<T>("le" + type, [](T x, T y) { return x <= y; });
  comparison<T>("gt" + type, [](T x, T y) { return x > y; });
  comparison<T>("ge" + type, [](T x, T y) { return x >= y; });
}
template <class T>
void define_equality(const std::string& type) {
  comparison<T>("eq" + type, [](T x, T y) { return x == y; });
  comparison<T>("ne" + type, [](T x, T y) { return x != y; });
}
template <class T>
void define_float_comparisons(const std::string& type) {
  static constexpr auto unordered = [](T x, T y) { return widen(x) != widen(x) || widen(y) != widen(y); };
  comparison<T>("eq" + type, [](T x, T y) { return widen(x) == widen(y); });
  comparison<T>("ne" + type, [](T x, T y) { return !unordered(x, y) && widen(x) != widen(y); });
  comparison<T>("lt" + type, [](T x, T y) { return widen(x) < widen(y); });
  comparison<T>("le" + type, [](T x, T y) { return widen(x) <= widen(y); });
  comparison<T>("gt" + type, [](T x, T y) { return widen(x) > widen(y); });
  comparison<T>("ge" + type, [](T x, T y) { return widen(x) >= widen(y); });
  comparison<T>("equ" + type, [](T x, T y) { return unordered(x, y) || widen(x) == widen(y); });
  comparison<T>("neu" + type, [](T x, T y) { return unordered(x, y) || widen(x) != widen(y); });
  comparison<T>("ltu" + type, [](T x, T y) { return !(widen(x) >= widen(y)); });
  comparison<T>("leu" + type, [](T x, T y) { return !(widen(x) > widen(y)); });
  comparison<T>("gtu" + type, [](T x, T y) { return !(widen(x) <= widen(y)); });
  comparison<T>("geu" + type, [](T x, T y) { return !(widen(x) < widen(y)); });
  comparison<T>("num" + type, [](T x, T y) { return !unordered(x, y); });
  comparison<T>("nan" + type, [](T x, T y) { return unordered(x, y); });
}

template <class T>
void select(Context& c) {
  const T *x = c.reg<T>(1), *y = c.reg<T>(2);
  const u32 p = c.predicate(3);
  T results[32];
  for (int lane = 0; lane < 32; lane++) results[lane] = p >> lane & 1 ? x[lane] : y[lane];
  c.write(0, results);
  c.set_undefined(0, c.undefined(3) | (p & c.undefined(1)) | (~p & c.undefined(2)));
}

// numbers[0]: 0 mov, 1 not, 2 and, 3 or, 4 xor.
void predicate_logic(Context& c) {
  const int op = c.number(0);
  const u32 x = c.predicate(1), x_undefined = c.undefined(1);
  const u32 y = op >= 2 ? c.predicate(2) : 0, y_undefined = op >= 2 ? c.undefined(2) : 0;
  u32 undefined = x_undefined | y_undefined;
  // A defined false decides "and", a defined true decides "or".
  if (op == 2) undefined = (x_undefined & y_undefined) | (x_undefined & y) | (y_undefined & x);
  if (op == 3) undefined = (x_undefined & y_undefined) | (x_undefined & ~y) | (y_undefined & ~x);
  c.write_predicate(0, op == 0 ? x : op == 1 ? ~x : op == 2 ? x & y : op == 3 ? x | y : x ^ y);
  c.set_undefined(0, undefined);
}

void define_arithmetic() {
  define_all_integers();
  define_floats<float>(".f32");
  define_floats<double>(".f64");
  define_float32_only();
  define_float64_only();
  define_halves<F16>(".f16");
  define_halves<BF16>(".bf16");
  define_pairs();
  elementwise<u16, u16>("mov.u16", [](u16 x) { return x; });
  halfwise<u32, 1>("mov.u32", [](u32 x) { return x; });
  halfwise<u64, 1>("mov.u64", [](u64 x) { return x; });
  define_equality<u16>(".u16"), define_equality<u32>(".u32"), define_equality<u64>(".u64");
  define_order<u16>(".u16"), define_order<u32>(".u32"), define_order<u64>(".u64");
  define_order<s16>(".s16"), define_order<s32>(".s32"), define_order<s64>(".s64");
  define_float_comparisons<float>(".f32"), define_float_comparisons<double>(".f64");
  define_float_comparisons<F16>(".f16"), define_float_comparisons<BF16>(".bf16");
  define("selp.u16", select<u16>), define("selp.u32", select<u32>), define("selp.u64", select<u64>);
  define("pred", predicate_logic);
}
