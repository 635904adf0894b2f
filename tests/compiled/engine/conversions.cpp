// Conversions between types, and registers packed into wider ones.
#include "machine.h"

// A number rounded to an integer; too large ones become the largest there is, NaN becomes 0.
template <class To>
To saturated(double x) {
  constexpr int bits = 8 * sizeof(To) - std::is_signed_v<To>;
  if (x != x) return 0;
  if (x >= std::ldexp(1.0, bits)) return std::numeric_limits<To>::max();
  if (x <= (std::is_signed_v<To> ? -std::ldexp(1.0, bits) : 0.0)) return std::numeric_limits<To>::min();
  return To(x);
}

template <class To, class From>
void define_float_to_integer(const std::string& types) {
  elementwise<To, From>("cvt.rzi." + types, [](From x) { return saturated<To>(std::trunc(double(widen(x)))); });
  elementwise<To, From>("cvt.rni." + types, [](From x) { return saturated<To>(std::nearbyint(double(widen(x)))); });
  elementwise<To, From>("cvt.rmi." + types, [](From x) { return saturated<To>(std::floor(double(widen(x)))); });
  elementwise<To, From>("cvt.rpi." + types, [](From x) { return saturated<To>(std::ceil(double(widen(x)))); });
}
template <class From>
void define_float_to_integers(const std::string& from) {
  define_float_to_integer<s16, From>("s16" + from), define_float_to_integer<u16, From>("u16" + from);
  define_float_to_integer<s32, From>("s32" + from), define_float_to_integer<u32, From>("u32" + from);
  define_float_to_integer<s64, From>("s64" + from), define_float_to_integer<u64, From>("u64" + from);
}

template <class From>
void define_from_integer(const std::string& from) {
  elementwise<u16, From>("cvt.u16" + from, [](From x) { return u16(x); });
  elementwise<s16, From>("cvt.s16" + from, [](From x) { return s16(x); });
  elementwise<u32, From>("cvt.u32" + from, [](From x) { return u32(x); });
  elementwise<s32, From>("cvt.s32" + from, [](From x) { return s32(x); });
  elementwise<u64, From>("cvt.u64" + from, [](From x) { return u64(x); });
  elementwise<s64, From>("cvt.s64" + from, [](From x) { return s64(x); });
  elementwise<float, From>("cvt.rn.f32" + from, [](From x) { return float(x); });
  elementwise<double, From>("cvt.rn.f64" + from, [](From x) { return double(x); });
  elementwise<F16, From>("cvt.rn.f16" + from, [](From x) { return narrow<F16>(double(x)); });
}

// To and from 8 bits, which lie in wider registers.
// numbers: register bytes, value bytes and sign of the source; the same of the target.
void convert_bytes(Context& c) {
  u64 results[32];
  for (int lane = 0; lane < 32; lane++) {
    const u64 x = extended(c.read(1, lane, c.number(0)), c.number(1), c.number(2));
    results[lane] = extended(x, c.number(4), c.number(5));
  }
  for (int lane = 0; lane < 32; lane++)
    if (c.active(lane)) c.write(0, lane, c.number(3), results[lane]);
  c.set_undefined(0, c.undefined(1));
}

template <class T>
void define_rounding_to_integers(const std::string& types) {
  elementwise<T, T>("cvt.rni." + types, [](T x) { return std::nearbyint(x); });
  elementwise<T, T>("cvt.rmi." + types, [](T x) { return std::floor(x); });
  elementwise<T, T>("cvt.rpi." + types, [](T x) { return std::ceil(x); });
  elementwise<T, T>("cvt.rzi." + types, [](T x) { return std::trunc(x); });
}

// Several registers side by side in a wider one. Operands: the wide one, its parts. numbers: bytes of a part, parts.
void pack(Context& c) {
  const int bytes = c.number(0), parts = c.number(1);
  u64 results[32] = {0};
  u32 low = 0, high = 0;
  for (int k = 0; k < parts; k++) {
    (2 * k < parts ? low : high) |= c.undefined(1 + k);
    for (int lane = 0; lane < 32; lane++)
      results[lane] |= extended(c.read(1 + k, lane, std::max(bytes, 2)), bytes, false) << (8 * bytes * k);
  }
  for (int lane = 0; lane < 32; lane++)
    if (c.active(lane)) c.write(0, lane, bytes * parts, results[lane]);
  if (bytes * parts < 4) low = high = low | high;
  c.set_undefined(0, low, high);
}
void unpack(Context& c) {
  const int bytes = c.number(0), parts = c.number(1);
  const u32 low = c.undefined_low(0), high = c.undefined_high(0);
  u64 values[32];
  for (int lane = 0; lane < 32; lane++) values[lane] = c.read(0, lane, bytes * parts);
  for (int k = 0; k < parts; k++) {
    for (int lane = 0; lane < 32; lane++)
      if (c.active(lane)) c.write(1 + k, lane, std::max(bytes, 2), extended(values[lane] >> 8 * bytes * k, bytes, false));
    c.set_undefined(1 + k, bytes * parts < 4 ? low | high : 2 * k < parts ? low : high);
  }
}

template <class T>
void define_to_half(const std::string& type) {
  elementwise<T, float>("cvt.rn." + type + ".f32", [](float x) { return narrow<T>(x); });
  elementwise<T, float>("cvt.rz." + type + ".f32", [](float x) { return narrow<T>(x, Rounding::toward_zero); });
  elementwise<T, double>("cvt.rn." + type + ".f64", [](double x) { return narrow<T>(x); });
  elementwise<u32, float, float>("cvt.rn." + type + "x2.f32", [](float high, float low) {
    return u32(narrow<T>(high).bits) << 16 | narrow<T>(low).bits;
  });
}

void define_conversions() {
  define_float_to_integers<float>(".f32"), define_float_to_integers<double>(".f64"), define_float_to_integers<F16>(".f16");
  define_from_integer<s16>(".s16"), define_from_integer<u16>(".u16"), define_from_integer<s32>(".s32");
  define_from_integer<u32>(".u32"), define_from_integer<s64>(".s64"), define_from_integer<u64>(".u64");
  define("cvt.bytes", convert_bytes);
  define_rounding_to_integers<float>("f32.f32");
  define_rounding_to_integers<double>("f64.f64");
  elementwise<double, float>("cvt.f64.f32", [](float x) { return double(x); });
  elementwise<float, double>("cvt.rn.f32.f64", [](double x) { return narrow<float>(x); });
  elementwise<float, double>("cvt.rz.f32.f64", [](double x) { return narrow<float>(x, Rounding::toward_zero); });
  elementwise<float, float>("cvt.ftz.f32.f32", [](float x) { return canonical(flush(x)); });
  elementwise<float, F16>("cvt.f32.f16", [](F16 x) { return canonical(widen(x)); });
  elementwise<float, BF16>("cvt.f32.bf16", [](BF16 x) { return widen(x); });
  elementwise<double, F16>("cvt.f64.f16", [](F16 x) { return double(widen(x)); });
  elementwise<double, BF16>("cvt.f64.bf16", [](BF16 x) { return double(widen(x)); });
  elementwise<u32, u32>("cvt.rna.tf32.f32", [](u32 x) { return tf32_nearest(x); });
  define_to_half<F16>("f16");
  define_to_half<BF16>("bf16");
  define("pack", pack);
  define("unpack", unpack);
}
