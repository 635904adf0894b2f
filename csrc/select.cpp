// select_nearest and bane_negatives on the CPU. An image is a task: its pixels are grouped by class, ranked by (squared
// distance, hash), and each group is parted at its quota.
#include <string.h>

#include <algorithm>
#include <limits>

#include "errors.h"
#include "host.h"
#include "ranks.h"

namespace contextrast {
namespace {

struct Ranked {
  uint64_t rank;
  uint32_t pixel;
};

// The memory of a thread for images of up to `pixels` pixels: the pixels of each class, one class after the other.
struct Groups {
  Ranked *ranked;   // (pixels)
  int32_t *starts;  // (num_classes + 1)

  Groups(Scratch &scratch, int64_t pixels, int64_t num_classes) {
    ranked = scratch.take<Ranked>(pixels);
    starts = scratch.take<int32_t>(num_classes + 1);
  }
};

// One image of classes and, unless null, distances.
template <class T>
struct Image {
  const T *classes;
  int64_t class_row, class_column;
  const int32_t *distance_sq;
  int64_t distance_row, distance_column;
  int height, width;
  int64_t num_classes;

  template <class Body>
  void for_pixels(const Body &body) const {  // body(class, row, column) for the pixels that belong to a class
    for (int r = 0; r < height; ++r)
      for (int c = 0; c < width; ++c) {
        const int64_t n = classes[r * class_row + c * class_column];
        if (n >= 0 && n < num_classes) body(n, r, c);
      }
  }
};

// decide(pixel, selected) for every pixel of the image that belongs to a class; returns their number.
template <class T, class Decide>
int64_t select(const Image<T> &image, double ratio, uint32_t key, const Groups &groups, const Decide &decide) {
  int32_t *const starts = groups.starts;  // counts, then where each class starts, then where it ends
  std::fill(starts, starts + image.num_classes + 1, 0);
  image.for_pixels([&](int64_t n, int, int) { ++starts[n + 1]; });
  for (int64_t n = 0; n < image.num_classes; ++n) starts[n + 1] += starts[n];
  image.for_pixels([&](int64_t n, int r, int c) {
    const uint32_t pixel = static_cast<uint32_t>(r * image.width + c);
    const int32_t distance_sq =
        image.distance_sq ? image.distance_sq[r * image.distance_row + c * image.distance_column] : 0;
    groups.ranked[starts[n]++] = {rank(distance_sq, hash(pixel, key)), pixel};
  });

  Ranked *start = groups.ranked;
  for (int64_t n = 0; n < image.num_classes; ++n) {
    Ranked *const stop = groups.ranked + starts[n], *const parting = start + quota(ratio, stop - start);
    if (start < parting && parting < stop)
      std::nth_element(start, parting, stop, [](const Ranked &a, const Ranked &b) { return a.rank < b.rank; });
    for (; start < parting; ++start) decide(start->pixel, true);
    for (; start < stop; ++start) decide(start->pixel, false);
  }
  return start - groups.ranked;
}

int64_t group_bytes(int64_t pixels, int64_t num_classes) {
  Scratch scratch(nullptr);
  Groups(scratch, pixels, num_classes);
  return scratch.used();
}

// The number of images that are selected from at once. A pixel costs several times what it costs elsewhere.
int workers(int64_t batch, int64_t pixels, int threads) {
  return static_cast<int>(lesser<int64_t>(threads_for(threads, 8 * batch * pixels), greater<int64_t>(batch, 1)));
}

// body(image, groups) for every image; a worker's groups lie in its own part of the memory.
template <class Body>
void for_images(int64_t batch, int64_t pixels, int64_t num_classes, int threads, void *memory, const Body &body) {
  const Step images{batch, [&](int64_t image, int worker) {
                      Scratch own(static_cast<char *>(memory) + worker * group_bytes(pixels, num_classes));
                      body(image, Groups(own, pixels, num_classes));
                    }};
  share(workers(batch, pixels, threads), images);
}

// ---- bane_negatives

// layer = map, sampled
void sample_map(const int32_t *map, int64_t batch, int64_t height, int64_t width, int64_t h, int64_t w, int32_t *layer,
                int threads) {
  const Step rows{batch * h, [&](int64_t task, int) {
                    const int r = sample(static_cast<int>(task % h), static_cast<int>(height), static_cast<int>(h));
                    const int32_t *row = map + (task / h * height + r) * width;
                    for (int c = 0; c < w; ++c)
                      layer[task * w + c] = row[sample(c, static_cast<int>(width), static_cast<int>(w))];
                  }};
  share(threads_for(threads, batch * h * w), rows);
}

// to[i] = from[i], for pixels of one image.
template <class T>
CONTEXTRAST_CLONES void narrow(const int32_t *from, int64_t start, int64_t pixels, T *to) {
  constexpr T none = std::numeric_limits<T>::max();
  for (int64_t i = start; i < start + pixels; ++i) to[i] = from[i] == NO_CLASS ? none : static_cast<T>(from[i]);
}

// The arguments of edge_distance for the squared distances (B, h, w) of classes (B, h, w).
struct EdgeDistance {
  ContextrastVolume classes;
  ContextrastDistance wanted;

  EdgeDistance(const int32_t *map, int64_t batch, int64_t h, int64_t w, int32_t *distance_sq)
      : classes{map, batch, {1, h, w}, h * w, {h * w, w, 1}, CONTEXTRAST_INT32},
        wanted{{1, 1, 1}, 0, 1, distance_sq, {nullptr, nullptr, nullptr}} {}
};

int64_t edge_distance_scratch(int64_t batch, int64_t h, int64_t w, int threads) {
  const EdgeDistance edges(nullptr, batch, h, w, nullptr);
  return contextrast_distance_scratch_cpu(&edges.classes, &edges.wanted, 1, threads);
}

}  // namespace
}  // namespace contextrast

extern "C" {

using namespace contextrast;

// A call with invalid arguments needs no scratch, so its size is 0.
int64_t contextrast_select_nearest_scratch_cpu(int64_t batch, int64_t height, int64_t width, int64_t num_classes,
                                               int threads) {
  char error[CONTEXTRAST_ERROR_SIZE];
  if (check_pixels("classes", height, width, error) || check_num_classes(num_classes, error)) return 0;
  return group_bytes(height * width, num_classes) * workers(batch, height * width, threads);
}

int contextrast_select_nearest_cpu(const ContextrastMap *classes, const ContextrastMap *distance_sq, double ratio,
                                   int64_t num_classes, const int64_t *seed, uint8_t *selected, void *scratch,
                                   int threads, char *error) {
  if (const int code = check_selection(*classes, *distance_sq, num_classes, error)) return code;
  const int64_t batch = classes->batch, pixels = classes->height * classes->width;
  if (batch <= 0 || pixels == 0) return CONTEXTRAST_OK;

  const uint32_t key = hash_key(*seed, TIES);
  memset(selected, 0, static_cast<size_t>(batch * pixels));
  for_images(batch, pixels, num_classes, threads, scratch, [&](int64_t b, const Groups &groups) {
    with_integer(classes->type, [&](auto zero) {
      using T = decltype(zero);
      const Image<T> image{static_cast<const T *>(classes->data) + b * classes->stride_batch,
                           classes->stride_row,
                           classes->stride_column,
                           static_cast<const int32_t *>(distance_sq->data) + b * distance_sq->stride_batch,
                           distance_sq->stride_row,
                           distance_sq->stride_column,
                           static_cast<int>(classes->height),
                           static_cast<int>(classes->width),
                           num_classes};
      select(image, ratio, key, groups,
             [&](uint32_t pixel, bool is_selected) { selected[b * pixels + pixel] = is_selected; });
    });
  });
  return CONTEXTRAST_OK;
}

// Scratch: with AT_FULL errors and distances at the labels' size; then, for one layer after the other in the same
// memory, its errors where they cannot lie in the result, its distances, and either what edge_distance or what the
// selection needs.
int64_t contextrast_bane_negatives_scratch_cpu(const ContextrastMap *labels, int64_t num_classes,
                                               const ContextrastLayer *layers, int num_layers, int type,
                                               int distance_at, int threads) {
  char error[CONTEXTRAST_ERROR_SIZE];
  if (check_layers(*labels, num_classes, layers, num_layers, type, error)) return 0;
  const int64_t batch = labels->batch, pixels = batch * labels->height * labels->width;
  const bool full = distance_at == CONTEXTRAST_AT_FULL;
  Scratch memory(nullptr);
  if (full) memory.take<int32_t>(pixels), memory.take<int32_t>(pixels);
  int64_t most = full ? edge_distance_scratch(batch, labels->height, labels->width, threads) : 0;
  for (int i = 0; i < num_layers; ++i) {
    const int64_t h = layers[i].height, w = layers[i].width;
    Scratch own(nullptr);
    if (type != CONTEXTRAST_INT32) own.take<int32_t>(batch * h * w);
    own.take<int32_t>(batch * h * w);
    const int64_t distances = full ? 0 : edge_distance_scratch(batch, h, w, threads);
    const int64_t groups = group_bytes(h * w, num_classes) * workers(batch, h * w, threads);
    most = greater(most, own.used() + greater(distances, groups));
  }
  return memory.used() + most;
}

int contextrast_bane_negatives_cpu(const ContextrastMap *predictions, const ContextrastMap *labels, int64_t num_classes,
                                   int64_t ignore_index, const ContextrastLayer *layers, int num_layers, int type,
                                   int64_t *errors, double ratio, int negatives, int distance_at, const int64_t *seed,
                                   void *scratch, int threads, char *error) {
  if (const int code = check_pair(*predictions, *labels, error)) return code;
  if (const int code = check_layers(*labels, num_classes, layers, num_layers, type, error)) return code;
  const int64_t batch = labels->batch, height = labels->height, width = labels->width;
  if (batch <= 0 || height * width == 0) return CONTEXTRAST_OK;

  const bool full = distance_at == CONTEXTRAST_AT_FULL, bane = negatives == CONTEXTRAST_BANE;
  const auto distances_of = [&](const int32_t *classes, int64_t h, int64_t w, int32_t *distance_sq,
                                const Scratch &spare) {
    const EdgeDistance edges(classes, batch, h, w, distance_sq);
    return contextrast_edge_distance_cpu(&edges.classes, &edges.wanted, spare.rest(), threads, error);
  };
  Scratch memory(scratch);
  int32_t *full_errors = nullptr, *full_distances = nullptr;
  if (full) {
    full_errors = memory.take<int32_t>(batch * height * width);
    full_distances = memory.take<int32_t>(batch * height * width);
    errors_at(*predictions, *labels, num_classes, ignore_index, height, width, full_errors, threads);
    if (bane) distances_of(full_errors, height, width, full_distances, memory);
  }
  const uint32_t key = hash_key(*seed, TIES);
  for (int i = 0; i < num_layers; ++i) {
    const int64_t h = layers[i].height, w = layers[i].width, pixels = h * w;
    if (pixels == 0) continue;
    Scratch own(memory.rest());
    const bool in_place = type == CONTEXTRAST_INT32;
    int32_t *const classes =
        in_place ? static_cast<int32_t *>(layers[i].negatives) : own.take<int32_t>(batch * pixels);
    int32_t *const distances = own.take<int32_t>(batch * pixels);
    if (full) {
      sample_map(full_errors, batch, height, width, h, w, classes, threads);
      if (bane) sample_map(full_distances, batch, height, width, h, w, distances, threads);
    } else {
      errors_at(*predictions, *labels, num_classes, ignore_index, h, w, classes, threads);
      if (bane) distances_of(classes, h, w, distances, own);
    }
    std::atomic<int64_t> count{0};
    for_images(batch, pixels, num_classes, threads, own.rest(), [&](int64_t b, const Groups &groups) {
      const int64_t start = b * pixels;
      const Image<int32_t> image{classes + start,
                                 w,
                                 1,
                                 bane ? distances + start : nullptr,
                                 w,
                                 1,
                                 static_cast<int>(h),
                                 static_cast<int>(w),
                                 num_classes};
      count += select(image, ratio, key, groups, [&](uint32_t pixel, bool selected) {
        if (!selected) classes[start + pixel] = NO_CLASS;
      });
      if (type == CONTEXTRAST_UINT8) narrow(classes, start, pixels, static_cast<uint8_t *>(layers[i].negatives));
      if (type == CONTEXTRAST_INT16) narrow(classes, start, pixels, static_cast<int16_t *>(layers[i].negatives));
    });
    errors[i] = count;
  }
  return CONTEXTRAST_OK;
}

}  // extern "C"
