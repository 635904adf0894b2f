// What the host code of every function shares: checks of arguments, dispatch on an integer type, threads, scratch.
#ifndef CONTEXTRAST_HOST_H
#define CONTEXTRAST_HOST_H

#include <limits.h>
#include <stddef.h>
#include <stdio.h>

#include <atomic>
#include <system_error>
#include <thread>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "errors.h"

// Where the compiler and the loader can choose between versions of a function at load time, the loops over pixels exist
// for the x86-64 levels 4 (AVX-512), 3 (AVX2) and the baseline; what they inline is compiled with them. CMakeLists.txt
// finds out.
#if defined(CONTEXTRAST_HAS_CLONES)
#define CONTEXTRAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CONTEXTRAST_CLONES
#endif

namespace contextrast {

// ---- Checks of arguments

template <class... Values>
int refuse(char *error, const char *format, Values... values) {
  snprintf(error, CONTEXTRAST_ERROR_SIZE, format, values...);
  return CONTEXTRAST_BAD_ARGUMENT;
}

inline bool is_integer(int32_t type) { return type >= CONTEXTRAST_UINT8 && type <= CONTEXTRAST_INT64; }

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int check_sides(const char *name, int64_t height, int64_t width, char *error) {
  if (height >= 0 && width >= 0 && height <= CONTEXTRAST_MAX_SIDE && width <= CONTEXTRAST_MAX_SIDE)
    return CONTEXTRAST_OK;
  return refuse(error, "%s: expected sides of at most %d pixels, got %lld x %lld. Crop or downsample it.", name,
                CONTEXTRAST_MAX_SIDE, static_cast<long long>(height), static_cast<long long>(width));
}

inline int check_integers(const char *name, const ContextrastMap &map, char *error) {
  if (is_integer(map.type) && map.channels == 0) return CONTEXTRAST_OK;
  return refuse(error,
                "%s: expected a map of uint8, int8, int16, int32 or int64, got type %d with %lld channels. "
                "Convert it to a class map.",
                name, static_cast<int>(map.type), static_cast<long long>(map.channels));
}

inline int check_integer_map(const char *name, const ContextrastMap &map, char *error) {
  if (const int code = check_integers(name, map, error)) return code;
  return check_sides(name, map.height, map.width, error);
}

inline bool is_integer_or_unsigned(int32_t type) { return is_integer(type) || type >= CONTEXTRAST_UINT16; }

// The volume of one distance function. `edges`: classes, which are integers; else a mask.
inline int check_volume(const char *name, const ContextrastVolume &volume, bool edges, char *error) {
  if (volume.type < CONTEXTRAST_UINT8 || volume.type > CONTEXTRAST_UINT64 ||
      (edges && !is_integer_or_unsigned(volume.type)))
    return refuse(error, "%s: expected %s, got type %d. Convert it to one.", name,
                  edges ? "an integer type" : "a type in contextrast.h", static_cast<int>(volume.type));
  int64_t voxels = 1;
  for (const int64_t size : volume.size) {
    if (size < 0 || size > CONTEXTRAST_MAX_SIDE)
      return refuse(error, "%s: expected sides of at most %d pixels, got %lld x %lld x %lld. Crop or downsample it.",
                    name, CONTEXTRAST_MAX_SIDE, static_cast<long long>(volume.size[0]),
                    static_cast<long long>(volume.size[1]), static_cast<long long>(volume.size[2]));
    voxels *= size;
  }
  if (voxels > CONTEXTRAST_MAX_VOXELS)
    return refuse(error, "%s: expected at most %lld voxels an image, got %lld. Crop or downsample it.", name,
                  static_cast<long long>(CONTEXTRAST_MAX_VOXELS), static_cast<long long>(voxels));
  return CONTEXTRAST_OK;
}

// Sides of pixels are positive and neither so small nor so large that a squared distance would leave the normal range
// of double.
constexpr double SMALLEST_SIDE = 1e-100, LARGEST_SIDE = 1e100;

inline int check_wanted(const ContextrastDistance &wanted, bool edges, char *error) {
  if (edges && (wanted.nearest[0] || wanted.nearest[1] || wanted.nearest[2]))
    return refuse(error, "nearest: expected null for distances to an edge, got a pointer. Set all three to null.");
  for (int axis = 0; wanted.sampled && axis < 3; ++axis)
    if (!(wanted.sampling[axis] >= SMALLEST_SIDE && wanted.sampling[axis] <= LARGEST_SIDE))
      return refuse(error, "sampling: expected %g to %g, got %g. Use another unit of length.", SMALLEST_SIDE,
                    LARGEST_SIDE, wanted.sampling[axis]);
  return CONTEXTRAST_OK;
}

constexpr int MARGIN = 32;  // pixels without a site around each line of the CPU's code

// The arguments have been checked.
inline Metric metric_of(const ContextrastVolume &volume, const ContextrastDistance &wanted) {
  Metric metric = {{1, 1, 1}, {1, 1, 1}, 1, 1, {1, 1, 1}, 0};
  // The largest power of two of which all sides are multiples; sides of axes of one pixel never count.
  int exponent = INT_MAX;
  for (int axis = 0; wanted.sampled && axis < 3; ++axis) {
    metric.side[axis] = volume.size[axis] > 1 ? wanted.sampling[axis] : 0;
    if (metric.side[axis] == 0) continue;
    int own;
    int64_t digits = static_cast<int64_t>(ldexp(frexp(metric.side[axis], &own), 53));
    for (own -= 53; digits % 2 == 0; digits /= 2) ++own;
    exponent = lesser(exponent, own);
  }
  if (exponent == INT_MAX) exponent = 0;  // no sampling, or a single pixel
  bool fits = true;
  double largest = 0, largest_integral = 0;
  for (int axis = 0; axis < 3; ++axis) {
    const double steps = static_cast<double>(volume.size[axis] - 1), side = ldexp(metric.side[axis], -exponent);
    largest_integral += side * steps * side * steps;
    // The CPU's tables reach MARGIN pixels beyond a line, and a search adds their entries to NO_COST.
    fits &= side == 0 || side * (steps + 1 + MARGIN) * side * (steps + 1 + MARGIN) < NO_COST;
    metric.weight[axis] = side < 1 << 15 ? static_cast<int32_t>(side * side) : 0;
    largest += metric.side[axis] * steps * metric.side[axis] * steps;
    // A last place of a cost up to `largest` is at most `largest` * 2^-52. The side's square must be at least four
    // times that.
    metric.search[axis] = metric.side[axis] * metric.side[axis] >= ldexp(largest, -50);
  }
  metric.unit = ldexp(1.0, 2 * exponent);
  metric.integral = fits && largest_integral < NO_COST;
  metric.largest = metric.integral ? static_cast<int32_t>(largest_integral) : 0;
  return metric;
}

// predictions and labels of one error map
inline int check_pair(const ContextrastMap &predictions, const ContextrastMap &labels, char *error) {
  if (const int code = check_integer_map("labels", labels, error)) return code;
  if (predictions.channels == 0) {
    if (const int code = check_integer_map("predictions", predictions, error)) return code;
  } else {
    if (predictions.channels < 0 || predictions.type < CONTEXTRAST_FLOAT16 || predictions.type > CONTEXTRAST_FLOAT64)
      return refuse(error,
                    "predictions: expected logits of float16, bfloat16, float32 or float64, got type %d with channels. "
                    "Convert them to float32.",
                    static_cast<int>(predictions.type));
    if (const int code = check_sides("predictions", predictions.height, predictions.width, error)) return code;
  }
  if (predictions.batch != labels.batch)
    return refuse(error,
                  "predictions: expected batch size %lld, that of labels, got %lld. Pass maps of the same images.",
                  static_cast<long long>(labels.batch), static_cast<long long>(predictions.batch));
  if (labels.batch > 0 && labels.height * labels.width > 0 && predictions.height * predictions.width == 0)
    return refuse(error,
                  "predictions: expected at least one pixel, as labels have %lld x %lld, got none. Pass a larger crop.",
                  static_cast<long long>(labels.height), static_cast<long long>(labels.width));
  return CONTEXTRAST_OK;
}

// The size of one selection. Sides may be of any length, as the rows may be those of all planes of a volume.
inline int check_pixels(const char *name, int64_t height, int64_t width, char *error) {
  constexpr int64_t most = CONTEXTRAST_MAX_SELECTION;
  if (height >= 0 && width >= 0 && height <= most && width <= most && height * width <= most) return CONTEXTRAST_OK;
  return refuse(error, "%s: expected at most %lld pixels an image, got %lld x %lld. Crop or downsample it.", name,
                static_cast<long long>(most), static_cast<long long>(height), static_cast<long long>(width));
}

inline int check_num_classes(int64_t num_classes, char *error) {
  if (num_classes >= 0 && num_classes <= CONTEXTRAST_MAX_CLASSES) return CONTEXTRAST_OK;
  return refuse(error, "num_classes: expected 0 to %d, got %lld. Pass a number in this range.",
                CONTEXTRAST_MAX_CLASSES, static_cast<long long>(num_classes));
}

// classes and distance_sq of one selection
inline int check_selection(const ContextrastMap &classes, const ContextrastMap &distance_sq, int64_t num_classes,
                           char *error) {
  if (const int code = check_num_classes(num_classes, error)) return code;
  if (const int code = check_integers("classes", classes, error)) return code;
  if (const int code = check_pixels("classes", classes.height, classes.width, error)) return code;
  if (distance_sq.type != CONTEXTRAST_INT32 || distance_sq.channels != 0 || distance_sq.batch != classes.batch ||
      distance_sq.height != classes.height || distance_sq.width != classes.width)
    return refuse(error,
                  "distance_sq: expected an int32 map of the size of classes, (%lld, %lld, %lld), got type %d and "
                  "(%lld, %lld, %lld). Pass the squared distances of these classes.",
                  static_cast<long long>(classes.batch), static_cast<long long>(classes.height),
                  static_cast<long long>(classes.width), static_cast<int>(distance_sq.type),
                  static_cast<long long>(distance_sq.batch), static_cast<long long>(distance_sq.height),
                  static_cast<long long>(distance_sq.width));
  return CONTEXTRAST_OK;
}

// The layers of one call
inline int check_layers(const ContextrastMap &labels, int64_t num_classes, const ContextrastLayer *layers,
                        int num_layers, int type, char *error) {
  if (const int code = check_num_classes(num_classes, error)) return code;
  if (num_layers < 0 || num_layers > CONTEXTRAST_MAX_LAYERS)
    return refuse(error, "layers: expected at most %d, got %d. Make several calls.", CONTEXTRAST_MAX_LAYERS,
                  num_layers);
  if (type != CONTEXTRAST_INT32) {
    if (type != CONTEXTRAST_UINT8 && type != CONTEXTRAST_INT16)
      return refuse(error, "negatives: expected uint8, int16 or int32, got type %d. Use int32.", type);
    if (num_classes > none_of(type))
      return refuse(error, "num_classes: expected 0 to %d for negatives of type %d, got %lld. Use int32 negatives.",
                    none_of(type), type, static_cast<long long>(num_classes));
  }
  for (int i = 0; i < num_layers; ++i) {
    if (const int code = check_sides("layers", layers[i].height, layers[i].width, error)) return code;
    if (labels.batch > 0 && layers[i].height * layers[i].width > 0 && labels.height * labels.width == 0)
      return refuse(error,
                    "labels: expected at least one pixel, as layer %d has %lld x %lld, got none. Pass a larger crop.",
                    i, static_cast<long long>(layers[i].height), static_cast<long long>(layers[i].width));
  }
  return CONTEXTRAST_OK;
}

// ---- Types

// body(T()) for the C++ type T of an integer map.
template <class Body>
void with_integer(int32_t type, const Body &body) {
  switch (type) {
    case CONTEXTRAST_UINT8: return body(uint8_t());
    case CONTEXTRAST_INT8: return body(int8_t());
    case CONTEXTRAST_INT16: return body(int16_t());
    case CONTEXTRAST_INT32: return body(int32_t());
    default: return body(int64_t());
  }
}

// ---- Threads

constexpr int MAX_THREADS = 64;
constexpr int64_t PIXELS_A_THREAD = 1 << 18;  // fewer take less time than the start of another thread

// The number of threads to use: at most those that the caller offers, and one for PIXELS_A_THREAD pixels each.
inline int threads_for(int threads, int64_t pixels) {
  const int64_t useful = 1 + pixels / PIXELS_A_THREAD;
  const int64_t offered = threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads;
  return static_cast<int>(offered < useful ? offered : useful);
}

// body(task, worker) for every task 0..tasks-1; worker is below the number of threads.
template <class Body>
struct Step {
  int64_t tasks;
  Body body;
};
template <class Body>
Step(int64_t, Body) -> Step<Body>;

// Runs one step after the other. Each task of a step goes to the next free thread. The threads end with the call, so
// that a process that forks later has none.
template <class... Bodies>
void share(int threads, const Step<Bodies> &...steps) {
  struct Progress {
    std::atomic<int64_t> taken{0}, done{0};
  } progress[sizeof...(steps)];
  const auto work = [&](int worker) {
    Progress *current = progress;
    const auto run = [&](const auto &step) {
      for (int64_t task; (task = current->taken.fetch_add(1, std::memory_order_relaxed)) < step.tasks;) {
        step.body(task, worker);
        current->done.fetch_add(1, std::memory_order_release);
      }
      while (current->done.load(std::memory_order_acquire) < step.tasks) std::this_thread::yield();
      ++current;
    };
    (run(steps), ...);
  };
  int64_t most = 1;
  ((most = steps.tasks > most ? steps.tasks : most), ...);
  std::thread helpers[MAX_THREADS];
  int started = 0;
  try {
    for (; started < threads - 1 && started < most - 1; ++started) helpers[started] = std::thread(work, started + 1);
  } catch (const std::system_error &) {
    // The system gives no more threads. Those that have started do the work.
  }
  work(0);
  for (int i = 0; i < started; ++i) helpers[i].join();
}

// ---- Scratch

// Takes pieces of the caller's memory. Each is aligned to 16 bytes and followed by 16 bytes that nothing uses. Without
// memory it only counts the bytes. Under AddressSanitizer the bytes between the pieces must not be touched.
class Scratch {
 public:
  explicit Scratch(void *memory) : start_(static_cast<char *>(memory)) {}
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;

  template <class T>
  T *take(int64_t count) {
    const int64_t start = used_, end = start + count * static_cast<int64_t>(sizeof(T));
    used_ = (end + 15) / 16 * 16 + 16;
    if (!start_) return nullptr;
#if defined(__SANITIZE_ADDRESS__)
    volatile char &last = start_[used_ - 1];
    last = 0;
    __asan_poison_memory_region(start_ + end, static_cast<size_t>(used_ - end));
#endif
    return reinterpret_cast<T *>(start_ + start);
  }

  int64_t used() const { return used_; }
  void *rest() const { return start_ + used_; }

#if defined(__SANITIZE_ADDRESS__)
  ~Scratch() {
    if (start_) __asan_unpoison_memory_region(start_, static_cast<size_t>(used_));
  }
#endif

 private:
  char *start_;
  int64_t used_ = 0;
};

// ---- A function of errors.cpp that select.cpp calls too

// The error map at size (height, width), labels and predictions each sampled from their own. The arguments have been
// checked.
void errors_at(const ContextrastMap &predictions, const ContextrastMap &labels, int64_t num_classes,
               int64_t ignore_index, int64_t height, int64_t width, int32_t *errors, int threads);

}  // namespace contextrast
#endif
