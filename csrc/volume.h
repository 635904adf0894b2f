// The volume of a distance function as edt.cpp and volume.cu see it: axes of one pixel are moved so that a map is
// (H, 1, W) and a line is (1, 1, W). The first axis holds the columns. Neither sums of costs nor the order of pixels in
// memory change with it.
#ifndef CONTEXTRAST_VOLUME_H
#define CONTEXTRAST_VOLUME_H

#include "host.h"
#include "lines.h"

namespace contextrast {
namespace {

constexpr int BAND = 32;  // pixels of a column that make a word

struct Volume {
  const void *data;
  int32_t type;
  int64_t batch, stride_batch;
  int size[3];
  int64_t stride[3];
  Metric metric;
  ContextrastDistance wanted;

  Volume(const ContextrastVolume &volume, const ContextrastDistance &asked)
      : data(volume.data), type(volume.type), batch(volume.batch), stride_batch(volume.stride_batch), wanted(asked) {
    metric = metric_of(volume, asked);
    for (int axis = 0; axis < 3; ++axis) {
      size[axis] = static_cast<int>(volume.size[axis]);
      stride[axis] = volume.stride[axis];
    }
    if (size[2] == 1) exchange(1, 2);
    if (size[2] == 1) exchange(0, 2);
    if (size[0] == 1) exchange(0, 1);
  }

  CONTEXTRAST_HD int64_t plane() const { return static_cast<int64_t>(size[1]) * size[2]; }
  CONTEXTRAST_HD int64_t image() const { return size[0] * plane(); }
  CONTEXTRAST_HD int64_t bands() const { return (size[0] + BAND - 1) / BAND; }
  bool has_keys() const { return wanted.nearest[0] || wanted.nearest[1] || wanted.nearest[2]; }

 private:
  template <class T>
  static void exchange(T (&values)[3], int a, int b) {
    const T value = values[a];
    values[a] = values[b];
    values[b] = value;
  }
  void exchange(int a, int b) {
    exchange(size, a, b);
    exchange(stride, a, b);
    exchange(metric.side, a, b);
    exchange(metric.weight, a, b);
    exchange(metric.search, a, b);
    exchange(wanted.nearest, a, b);
  }
};

}  // namespace
}  // namespace contextrast
#endif
