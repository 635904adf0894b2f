// Eq. 6 for one pixel: sampling a map at another size, the class of largest logit, the error class.
#ifndef CONTEXTRAST_ERRORS_H
#define CONTEXTRAST_ERRORS_H

#include "lines.h"

namespace contextrast {

// Row (or column) of a map of size `from` that index i of a map of size `to` samples.
CONTEXTRAST_HD int sample(int i, int from, int to) { return i * from / to; } // below 2^28

// Classes are 0..limit-1.
CONTEXTRAST_HD int64_t class_limit(int64_t num_classes, int64_t channels) {
  if (num_classes < 0) num_classes = channels > 0 ? channels : INT64_MAX;
  return lesser(num_classes, static_cast<int64_t>(INT32_MAX) + 1);
}

// The class, or -1 for a value that is none. Values come in as int64, so that ignore_index -100 never meets a uint8 156.
CONTEXTRAST_HD int32_t class_or_none(int64_t value, int64_t limit) {
  return static_cast<uint64_t>(value) < static_cast<uint64_t>(limit) ? static_cast<int32_t>(value) : -1;
}

CONTEXTRAST_HD int32_t label_or_none(int64_t value, int64_t limit, int64_t ignore_index) {
  return value == ignore_index ? -1 : class_or_none(value, limit);
}

CONTEXTRAST_HD int32_t error_class(int32_t label, int32_t prediction) {
  return label >= 0 && prediction != label ? prediction : -1;
}

// Logits are compared as integers in the order of their values: the bits of a non-negative number, the negated magnitude of a negative one
// (so -0 equals 0), and the largest key for NaN. `Bits` is the signed integer of the logit's width, `infinity` the bits of +inf.
template <class Bits>
CONTEXTRAST_HD Bits order_key(Bits bits, Bits infinity) {
  constexpr Bits sign = static_cast<Bits>(Bits(1) << (8 * sizeof(Bits) - 1)), largest = static_cast<Bits>(~sign);
  const Bits magnitude = static_cast<Bits>(bits & largest);
  return magnitude > infinity ? largest : bits < 0 ? static_cast<Bits>(-magnitude) : magnitude;
}

constexpr int16_t INFINITY_FLOAT16 = 0x7C00, INFINITY_BFLOAT16 = 0x7F80;
constexpr int32_t INFINITY_FLOAT32 = 0x7F800000;
constexpr int64_t INFINITY_FLOAT64 = 0x7FF0000000000000;

} // namespace contextrast
#endif
