// error_map on the CPU: rows of labels and predictions are brought to int32 classes and compared.
#include "errors.h"

#include <string.h>

#include "host.h"

namespace contextrast {
namespace {

constexpr int STRETCH = 256;  // columns at a time: their logits stay in the cache, whichever axis lies dense in memory

// What one row of an output of a given size takes from a map.
struct RowSource {
  const ContextrastMap &map;
  int height, width;  // of the output

  // Offset, in elements, of the map's row that output row r of an image samples.
  int64_t row(int64_t image, int r) const {
    return image * map.stride_batch + sample(r, static_cast<int>(map.height), height) * map.stride_row;
  }
  int64_t column(int c) const { return sample(c, static_cast<int>(map.width), width) * map.stride_column; }
  bool dense() const { return map.width == width && map.stride_column == 1; }
};

// classes[i] of the output columns first..first+count-1, from row pointer `row`.
template <class T>
CONTEXTRAST_CLONES void read_classes(const RowSource &source, const T *row, int first, int count, uint64_t limit,
                                     int64_t ignore_index, int32_t *classes) {
  if (source.dense())
    for (int i = 0; i < count; ++i) classes[i] = prediction_of(row[first + i], limit, ignore_index);
  else
    for (int i = 0; i < count; ++i) classes[i] = prediction_of(row[source.column(first + i)], limit, ignore_index);
}

template <class T>
CONTEXTRAST_CLONES void read_labels(const RowSource &source, const T *row, int first, int count, uint64_t limit,
                                    int64_t ignore_index, int32_t *labels) {
  if (source.dense())
    for (int i = 0; i < count; ++i) labels[i] = target_of(row[first + i], limit, ignore_index);
  else
    for (int i = 0; i < count; ++i) labels[i] = target_of(row[source.column(first + i)], limit, ignore_index);
}

// The channel of the largest logit, the lowest of equals. Bits is the signed integer of the logits' width.
template <class Bits>
CONTEXTRAST_CLONES void read_argmax(const RowSource &source, const Bits *row, int first, int count, Bits infinity,
                                    uint64_t limit, int64_t ignore_index, int32_t *classes) {
  Bits largest[STRETCH];
  int64_t column[STRETCH];
  const bool dense = source.dense();
  if (!dense)
    for (int i = 0; i < count; ++i) column[i] = source.column(first + i);
  for (int i = 0; i < count; ++i) {
    largest[i] = order_key(row[dense ? first + i : column[i]], infinity);
    classes[i] = 0;
  }
  for (int64_t n = 1; n < source.map.channels; ++n) {
    const Bits *channel = row + n * source.map.stride_channel;
    const auto update = [&](int i, Bits bits) {
      const Bits key = order_key(bits, infinity);
      classes[i] = key > largest[i] ? static_cast<int32_t>(n) : classes[i];
      largest[i] = greater(largest[i], key);
    };
    if (dense)
      for (int i = 0; i < count; ++i) update(i, channel[first + i]);
    else
      for (int i = 0; i < count; ++i) update(i, channel[column[i]]);
  }
  for (int i = 0; i < count; ++i) classes[i] = prediction_of(classes[i], limit, ignore_index);
}

void read_predictions(const RowSource &source, int64_t offset, int first, int count, uint64_t limit,
                      int64_t ignore_index, int32_t *classes) {
  const auto argmax = [&](auto infinity) {
    using Bits = decltype(infinity);
    read_argmax(source, static_cast<const Bits *>(source.map.data) + offset, first, count, infinity, limit,
                ignore_index, classes);
  };
  switch (source.map.type) {
    case CONTEXTRAST_FLOAT16: return argmax(int16_t(INFINITY_FLOAT16));
    case CONTEXTRAST_BFLOAT16: return argmax(int16_t(INFINITY_BFLOAT16));
    case CONTEXTRAST_FLOAT32: return argmax(int32_t(INFINITY_FLOAT32));
    case CONTEXTRAST_FLOAT64: return argmax(int64_t(INFINITY_FLOAT64));
    default:
      with_integer(source.map.type, [&](auto zero) {
        using T = decltype(zero);
        read_classes(source, static_cast<const T *>(source.map.data) + offset, first, count, limit, ignore_index,
                     classes);
      });
  }
}

CONTEXTRAST_CLONES void compare(const int32_t *labels, const int32_t *predictions, int count, int32_t *errors) {
  for (int i = 0; i < count; ++i) errors[i] = error_class(labels[i], predictions[i]);
}

}  // namespace

void errors_at(const ContextrastMap &predictions, const ContextrastMap &labels, int64_t num_classes,
               int64_t ignore_index, int64_t height, int64_t width, int32_t *errors, int threads) {
  const int h = static_cast<int>(height), w = static_cast<int>(width);
  const RowSource prediction_source{predictions, h, w}, label_source{labels, h, w};
  const uint64_t limit = class_limit(num_classes, predictions.channels), pixels = labels.batch * height * width;
  const Step rows{labels.batch * height, [&](int64_t task, int) {
                    const int64_t image = task / height;
                    const int r = static_cast<int>(task % height);
                    int32_t classes[STRETCH], targets[STRETCH];
                    for (int first = 0; first < w; first += STRETCH) {
                      const int count = lesser(STRETCH, w - first);
                      with_integer(labels.type, [&](auto zero) {
                        using T = decltype(zero);
                        const T *row = static_cast<const T *>(labels.data) + label_source.row(image, r);
                        read_labels(label_source, row, first, count, limit, ignore_index, targets);
                      });
                      read_predictions(prediction_source, prediction_source.row(image, r), first, count, limit,
                                       ignore_index, classes);
                      compare(targets, classes, count, errors + task * width + first);
                    }
                  }};
  share(threads_for(threads, pixels * greater<int64_t>(predictions.channels, 1)), rows);
}

}  // namespace contextrast

extern "C" int contextrast_interface(void) { return CONTEXTRAST_INTERFACE; }

extern "C" int contextrast_error_map_cpu(const ContextrastMap *predictions, const ContextrastMap *labels,
                                         int64_t num_classes, int64_t ignore_index, int32_t *errors, int threads,
                                         char *error) {
  if (const int code = contextrast::check_pair(*predictions, *labels, error)) return code;
  if (labels->batch > 0 && labels->height > 0 && labels->width > 0)
    contextrast::errors_at(*predictions, *labels, num_classes, ignore_index, labels->height, labels->width, errors,
                           threads);
  return CONTEXTRAST_OK;
}
