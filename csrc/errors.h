// Eq. 6 for one pixel: sampling a map at another size, the class of largest logit, the error class.
#ifndef CONTEXTRAST_ERRORS_H
#define CONTEXTRAST_ERRORS_H

#include "lines.h"

namespace contextrast {

// Row (or column) of a map of size `from` that index i of a map of size `to` samples.
// Sizes that differ are at most CONTEXTRAST_MAX_SIDE, so that the product stays below 2^28.
CONTEXTRAST_HD int sample(int i, int from, int to) { return from == to ? i : i * from / to; }

// Classes are 0..limit-1. num_classes = -1: the channels of the logits, or all values of 63 bits.
CONTEXTRAST_HD uint64_t class_limit(int64_t num_classes, int64_t channels) {
  if (num_classes >= 0) return static_cast<uint64_t>(num_classes);
  return channels > 0 ? static_cast<uint64_t>(channels) : static_cast<uint64_t>(1) << 63;
}

constexpr int32_t NO_CLASS = -1;
constexpr int32_t LARGE_CLASS = -2;  // a label that is a class beyond int32, which no prediction can equal

// What NO_CLASS is called in negatives of a type.
CONTEXTRAST_HD constexpr int32_t none_of(int32_t type) {
  return type == CONTEXTRAST_UINT8 ? UINT8_MAX : type == CONTEXTRAST_INT16 ? INT16_MAX : NO_CLASS;
}

// Values are compared as int64, so that ignore_index = -100 is not equal to the uint8 156.
CONTEXTRAST_HD int32_t prediction_of(int64_t value, uint64_t limit, int64_t ignore_index) {
  const bool is_class = static_cast<uint64_t>(value) < limit && value <= INT32_MAX && value != ignore_index;
  return is_class ? static_cast<int32_t>(value) : NO_CLASS;
}

CONTEXTRAST_HD int32_t target_of(int64_t value, uint64_t limit, int64_t ignore_index) {
  if (static_cast<uint64_t>(value) >= limit || value == ignore_index) return NO_CLASS;
  return value <= INT32_MAX ? static_cast<int32_t>(value) : LARGE_CLASS;
}

CONTEXTRAST_HD int32_t error_class(int32_t target, int32_t prediction) {
  return target != NO_CLASS && prediction != target ? prediction : NO_CLASS;
}

// Logits are compared as integers in the order of their values: the bits of a non-negative number, the negated
// magnitude of a negative one (so -0 equals 0), and the largest key for NaN. `Bits` is the signed integer of the
// logit's width, `infinity` the bits of +inf.
template <class Bits>
CONTEXTRAST_HD Bits order_key(Bits bits, Bits infinity) {
  constexpr Bits sign = static_cast<Bits>(Bits(1) << (8 * sizeof(Bits) - 1)), largest = static_cast<Bits>(~sign);
  const Bits magnitude = static_cast<Bits>(bits & largest);
  return magnitude > infinity ? largest : bits < 0 ? static_cast<Bits>(-magnitude) : magnitude;
}

constexpr int16_t INFINITY_FLOAT16 = 0x7C00, INFINITY_BFLOAT16 = 0x7F80;
constexpr int32_t INFINITY_FLOAT32 = 0x7F800000;
constexpr int64_t INFINITY_FLOAT64 = 0x7FF0000000000000;

}  // namespace contextrast
#endif
