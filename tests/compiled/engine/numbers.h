// Numbers of the PTX types, and rounding from one type to another.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

template <class To, class From>
inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &x, sizeof x);
  return result;
}
inline float as_float(u32 x) { return bits_as<float>(x); }
inline double as_double(u64 x) { return bits_as<double>(x); }
inline u32 bits_of(float x) { return bits_as<u32>(x); }
inline u64 bits_of(double x) { return bits_as<u64>(x); }

struct F16 {
  u16 bits;
};
struct BF16 {
  u16 bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BF16 x) { return as_float(u32(x.bits) << 16); }
inline float widen(F16 x) {
  float magnitude = as_float(u32(x.bits & 0x7fff) << 13) * 0x1p112f;
  if ((x.bits & 0x7c00) == 0x7c00) magnitude = as_float(bits_of(magnitude) | 0x7f800000u);
  return (x.bits & 0x8000) ? -magnitude : magnitude;
}

// PTX's NaN of an arithmetic result. In float64 hardware may keep the payload of an operand; here all are the same.
inline float canonical(float x) { return x != x ? as_float(0x7fffffffu) : x; }
inline double canonical(double x) { return x != x ? as_double(0x7ff8000000000000u) : x; }

// Subnormal numbers become zero, as the modifier .ftz asks.
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
inline double flush(double x) { return std::fabs(x) < 0x1p-1022 ? std::copysign(0.0, x) : x; }

enum class Rounding { nearest, toward_zero };

// The number of `precision` bits, not finer than 2^(smallest - precision + 1), that x rounds to; one rounding.
inline double rounded(double x, int precision, int smallest, Rounding rounding) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), smallest) - precision + 1;
  const double units = std::ldexp(x, -exponent);
  return std::ldexp(rounding == Rounding::nearest ? std::nearbyint(units) : std::trunc(units), exponent);
}

inline float float_toward_zero(double x) {
  float f = float(x);
  return std::fabs(double(f)) > std::fabs(x) ? as_float(bits_of(f) - 1) : f;
}

template <class T>
T narrow(double x, Rounding rounding = Rounding::nearest);

template <>
inline double narrow<double>(double x, Rounding) { return x; }

template <>
inline float narrow<float>(double x, Rounding rounding) {
  return canonical(rounding == Rounding::nearest ? float(x) : float_toward_zero(x));
}

template <>
inline F16 narrow<F16>(double x, Rounding rounding) {
  if (x != x) return F16{0x7fff};
  const u16 sign = std::signbit(x) ? 0x8000 : 0;
  const double size = std::fabs(rounded(x, 11, -14, rounding));
  if (size > 65504) return F16{u16(sign | (rounding == Rounding::nearest || std::isinf(x) ? 0x7c00 : 0x7bff))};
  if (size < 0x1p-14) return F16{u16(sign | u16(size * 0x1p24))};
  return F16{u16(sign | ((bits_of(float(size)) - (112u << 23)) >> 13))};
}

template <>
inline BF16 narrow<BF16>(double x, Rounding rounding) {
  if (x != x) return BF16{0x7fff};
  const double value = rounded(x, 8, -126, rounding);
  if (std::fabs(value) > 0x1.fep127 && std::isfinite(x) && rounding == Rounding::toward_zero)
    return BF16{u16(std::signbit(x) ? 0xff7f : 0x7f7f)};
  return BF16{u16(bits_of(float(value)) >> 16)};
}

// TF32: float32 with 10 bits after the point, ties away from zero.
inline u32 tf32_nearest(u32 x) { return (x & 0x7f800000u) == 0x7f800000u ? x : (x + 0x1000u) & ~0x1fffu; }
inline float tf32_of(u32 x) { return as_float(x & ~0x1fffu); }

// Minimum and maximum: a NaN loses against a number, -0 is below +0.
template <class T>
inline T minimum(T x, T y) {
  if (x != x) return canonical(y);
  if (y != y) return x;
  return x < y ? x : y < x ? y : std::signbit(x) ? x : y;
}
template <class T>
inline T maximum(T x, T y) {
  if (x != x) return canonical(y);
  if (y != y) return x;
  return x > y ? x : y > x ? y : std::signbit(x) ? y : x;
}

// The low `bytes` bytes of x as a number of 64 bits.
inline u64 extended(u64 x, int bytes, bool is_signed) {
  if (bytes == 8) return x;
  x &= (u64(1) << 8 * bytes) - 1;
  if (is_signed && (x >> (8 * bytes - 1) & 1)) x |= ~u64(0) << 8 * bytes;
  return x;
}
