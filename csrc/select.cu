// error_map, select_nearest and bane_negatives on CUDA. A segment is the pixels of one class in one image of one layer.
//   1. find_errors or read_classes   every pixel's class, and the number of pixels of each segment. The last block to
//                                    finish in an image places its segments one after the other.
//   2. (mark and solve of edt.cu)    the distances
//   3. place                         the pixels of each segment, as a list
//   4. choose                        a block parts a segment at its quota (choose.cuh) and writes the result
// Atomics give the counts, the places of the lists and the order inside them. No result depends on that order.
#include <type_traits>

#include "choose.cuh"
#include "edt.cuh"
#include "errors.h"

namespace contextrast {
namespace {

// Pixels pixels[start..start + size - 1] of the image's list. Until the layout is done, start is the segment's slot.
struct Segment {
  uint32_t start, size;
};

// One layer of a selection. A segment's slot is its class.
struct Layer {
  int32_t height, width;
  int32_t type;           // of classes, as the negatives of bane_negatives have them
  void *classes;          // (B, height, width): the class, or none
  int64_t *errors;        // one number, a result: the pixels that belong to a class; or null
  int32_t *distance_sq;  // likewise, or null: all equal
  uint8_t *selected;     // likewise: the result; or null: the result is left in classes

  int32_t slots;          // the number of classes, at least 1
  uint32_t *sizes;        // (B, slots): pixels; after the layout, where the segment's next pixel goes
  uint32_t *num_present;  // (B)
  uint32_t *tickets;      // (B)
  unsigned long long *num_classified;  // one number
  Segment *present;       // (B, most_present()): the segments that have pixels
  uint32_t *pixels;       // (B, height * width)

  __device__ int32_t class_at(int64_t pixel) const {
    const int32_t n = type == CONTEXTRAST_UINT8   ? static_cast<const uint8_t *>(classes)[pixel]
                      : type == CONTEXTRAST_INT16 ? static_cast<const int16_t *>(classes)[pixel]
                                                  : static_cast<const int32_t *>(classes)[pixel];
    return n == none_of(type) ? NO_CLASS : n;
  }
  __device__ void set_class(int64_t pixel, int32_t n) const {
    if (n == NO_CLASS) n = none_of(type);
    if (type == CONTEXTRAST_UINT8)
      static_cast<uint8_t *>(classes)[pixel] = static_cast<uint8_t>(n);
    else if (type == CONTEXTRAST_INT16)
      static_cast<int16_t *>(classes)[pixel] = static_cast<int16_t>(n);
    else
      static_cast<int32_t *>(classes)[pixel] = n;
  }

  __host__ __device__ int num_pixels() const { return height * width; }
  __host__ __device__ int most_present() const { return lesser(slots, num_pixels()); }

  void shape(int64_t h, int64_t w, int64_t num_classes);
  void take_zeroed(Scratch &scratch, int64_t batch);
  void take_lists(Scratch &scratch, int64_t batch);
};

struct Layers {
  int32_t batch = 0, count = 0;
  Layer layer[CONTEXTRAST_MAX_LAYERS];
};

struct LayersWork {
  Layers layers;
  LayerBlocks blocks;
};
static_assert(sizeof(LayersWork) + 3 * sizeof(ContextrastMap) <= 4096, "parameters of a kernel");

// ---- 1. Classes

// The pixels of one image that a block works on. Threads beyond the end of the image have no pixel but still take part
// in the exchanges between threads.
struct Spot {
  const Layer &layer;
  int image, first, blocks;  // the first pixel; the blocks of an image

  __device__ Spot(const LayersWork &work, int pixels) : Spot(work, work.blocks.find(blockIdx.x), pixels) {}
  __device__ Spot(const LayersWork &work, BlockOfLayer mine, int pixels)
      : layer(work.layers.layer[mine.layer]), blocks((layer.num_pixels() + pixels - 1) / pixels) {
    image = mine.block / blocks;
    first = mine.block % blocks * pixels;
  }
};

// The warp counts its pixels of classes n.
__device__ void count_pixels(const Layer &layer, int image, int32_t n) {
  const unsigned peers = __match_any_sync(ALL_LANES, n);
  if (n < 0 || static_cast<int>(threadIdx.x % WARP) != trailing_zeros(peers)) return;
  const uint32_t count = static_cast<uint32_t>(__popc(peers));
  if (atomicAdd(layer.sizes + static_cast<int64_t>(image) * layer.slots + n, count) == 0) {
    const uint32_t i = atomicAdd(layer.num_present + image, 1u);
    layer.present[static_cast<int64_t>(image) * layer.most_present() + i].start = static_cast<uint32_t>(n);
  }
}

struct LayoutShared {
  uint32_t filled;
};

// The block gives every segment of the image its part of the list.
__device__ void lay_out(const Layer &layer, int image) {
  auto &shared = block_shared<LayoutShared>();
  if (threadIdx.x == 0) shared.filled = 0;
  __syncthreads();
  uint32_t *const sizes = layer.sizes + static_cast<int64_t>(image) * layer.slots;
  Segment *const present = layer.present + static_cast<int64_t>(image) * layer.most_present();
  const uint32_t count = __ldcg(layer.num_present + image);
  for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
    const uint32_t slot = __ldcg(&present[i].start), size = __ldcg(sizes + slot);
    const uint32_t start = atomicAdd(&shared.filled, size);
    present[i] = {start, size};
    sizes[slot] = start;
  }
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(layer.num_classified, static_cast<unsigned long long>(shared.filled));
}

__device__ int64_t value_at(const ContextrastMap &map, int64_t offset) {
  switch (map.type) {
    case CONTEXTRAST_UINT8: return __ldg(static_cast<const uint8_t *>(map.data) + offset);
    case CONTEXTRAST_INT8: return __ldg(static_cast<const int8_t *>(map.data) + offset);
    case CONTEXTRAST_INT16: return __ldg(static_cast<const int16_t *>(map.data) + offset);
    case CONTEXTRAST_INT32: return __ldg(static_cast<const int32_t *>(map.data) + offset);
    default: return __ldg(static_cast<const int64_t *>(map.data) + offset);
  }
}

// Offset of what pixel (r, c) of a layer samples.
__device__ int64_t sampled_at(const ContextrastMap &map, int image, int r, int c, const Layer &layer) {
  return image * map.stride_batch + sample(r, static_cast<int>(map.height), layer.height) * map.stride_row +
         sample(c, static_cast<int>(map.width), layer.width) * map.stride_column;
}

// The channel of the largest logit, the lowest of equals.
template <class Bits>
__device__ int64_t argmax_at(const ContextrastMap &logits, int64_t offset, Bits infinity) {
  const Bits *const first = static_cast<const Bits *>(logits.data) + offset;
  Bits largest = order_key(__ldg(first), infinity);
  int64_t n = 0;
#pragma unroll 8
  for (int64_t i = 1; i < logits.channels; ++i) {
    const Bits key = order_key(__ldg(first + i * logits.stride_channel), infinity);
    if (key > largest) {
      largest = key;
      n = i;
    }
  }
  return n;
}

struct ErrorSource {
  ContextrastMap predictions, labels;
  uint64_t limit;
  int64_t ignore_index, infinity;  // of the logits
};

// The pixels of a thread. With logits one pixel has enough reads to hide their latency.
template <class Bits>
constexpr int PIXELS = std::is_void_v<Bits> ? 4 : 1;

// Eq. 6. Bits is void for a class map of predictions. Segments are counted where there is memory for it.
template <class Bits>
__global__ void __launch_bounds__(BLOCK)
    find_errors(const __grid_constant__ LayersWork work, const __grid_constant__ ErrorSource source) {
  const Spot spot(work, BLOCK * PIXELS<Bits>);
  const Layer &layer = spot.layer;
  int32_t errors[PIXELS<Bits>];
#pragma unroll
  for (int i = 0; i < PIXELS<Bits>; ++i) {
    const int pixel = spot.first + i * BLOCK + static_cast<int>(threadIdx.x);
    errors[i] = NO_CLASS;
    if (pixel >= layer.num_pixels()) continue;
    const int r = pixel / layer.width, c = pixel % layer.width;
    const int32_t target = target_of(value_at(source.labels, sampled_at(source.labels, spot.image, r, c, layer)),
                                     source.limit, source.ignore_index);
    const int64_t at = sampled_at(source.predictions, spot.image, r, c, layer);
    if constexpr (std::is_void_v<Bits>)
      errors[i] = error_class(
          target, prediction_of(value_at(source.predictions, at), source.limit, source.ignore_index));
    else if (target != NO_CLASS)
      errors[i] = error_class(
          target, prediction_of(argmax_at(source.predictions, at, static_cast<Bits>(source.infinity)), source.limit,
                                source.ignore_index));
    layer.set_class(static_cast<int64_t>(spot.image) * layer.num_pixels() + pixel, errors[i]);
  }
  if (!layer.sizes) return;
#pragma unroll
  for (int i = 0; i < PIXELS<Bits>; ++i) count_pixels(layer, spot.image, errors[i]);
  if (is_last_block(layer.tickets + spot.image, static_cast<uint32_t>(spot.blocks))) lay_out(layer, spot.image);
}

struct ClassSource {
  ContextrastMap classes, distance_sq;
  uint64_t num_classes;
};

// Classes and distances that are there already are brought to the layer.
__global__ void __launch_bounds__(BLOCK)
    read_classes(const __grid_constant__ LayersWork work, const __grid_constant__ ClassSource source) {
  constexpr int COUNT = PIXELS<void>;
  const Spot spot(work, BLOCK * COUNT);
  const Layer &layer = spot.layer;
  const int64_t start = static_cast<int64_t>(spot.image) * layer.num_pixels();
  int32_t classes[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const int pixel = spot.first + i * BLOCK + static_cast<int>(threadIdx.x);
    classes[i] = NO_CLASS;
    if (pixel >= layer.num_pixels()) continue;
    const int r = pixel / layer.width, c = pixel % layer.width;
    const int64_t n = value_at(source.classes, sampled_at(source.classes, spot.image, r, c, layer));
    if (static_cast<uint64_t>(n) < source.num_classes) classes[i] = static_cast<int32_t>(n);
    layer.set_class(start + pixel, classes[i]);
    if (layer.distance_sq)
      layer.distance_sq[start + pixel] = __ldg(static_cast<const int32_t *>(source.distance_sq.data) +
                                               sampled_at(source.distance_sq, spot.image, r, c, layer));
    if (layer.selected) layer.selected[start + pixel] = 0;
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) count_pixels(layer, spot.image, classes[i]);
  if (is_last_block(layer.tickets + spot.image, static_cast<uint32_t>(spot.blocks))) lay_out(layer, spot.image);
}

// ---- 3. Place

__global__ void __launch_bounds__(BLOCK) place(const __grid_constant__ LayersWork work) {
  const Spot spot(work, BLOCK);
  const Layer &layer = spot.layer;
  const int64_t start = static_cast<int64_t>(spot.image) * layer.num_pixels();
  const int pixel = spot.first + static_cast<int>(threadIdx.x), lane = threadIdx.x % WARP;
  const int32_t n = pixel < layer.num_pixels() ? layer.class_at(start + pixel) : NO_CLASS;
  const unsigned peers = __match_any_sync(ALL_LANES, n);
  const int leader = trailing_zeros(peers);
  uint32_t first = 0;
  if (n >= 0 && lane == leader)
    first = atomicAdd(layer.sizes + static_cast<int64_t>(spot.image) * layer.slots + n,
                      static_cast<uint32_t>(__popc(peers)));
  first = __shfl_sync(ALL_LANES, first, leader);
  if (n >= 0)
    layer.pixels[start + first + static_cast<uint32_t>(__popc(peers & ((1u << lane) - 1)))] =
        static_cast<uint32_t>(pixel);
}

// ---- 4. Choose

constexpr int MOST_BLOCKS = 64;  // for the segments of an image

__host__ __device__ inline int choosing_blocks(const Layer &layer) { return lesser(layer.most_present(), MOST_BLOCKS); }

__global__ void __launch_bounds__(CHOOSERS, 3)
    choose(const __grid_constant__ LayersWork work, double ratio, const int64_t *seed) {
  const BlockOfLayer mine = work.blocks.find(blockIdx.x);
  const Layer &layer = work.layers.layer[mine.layer];
  const int blocks = choosing_blocks(layer), image = mine.block / blocks;
  const int64_t start = static_cast<int64_t>(image) * layer.num_pixels();
  const Segment *const present = layer.present + static_cast<int64_t>(image) * layer.most_present();
  const uint32_t count = layer.num_present[image];
  if (layer.errors && mine.block == 0 && threadIdx.x == 0) *layer.errors = static_cast<int64_t>(*layer.num_classified);
  for (uint32_t i = mine.block % blocks; i < count; i += blocks) {
    const uint32_t size = present[i].size, selected = static_cast<uint32_t>(quota(ratio, size));
    if (selected == (layer.selected ? 0 : size)) continue;  // the result is there already
    Chooser chooser{block_shared<ChooseShared>(),
                    layer.pixels + start + present[i].start,
                    size,
                    layer.distance_sq ? layer.distance_sq + start : nullptr,
                    hash_key(*seed, TIES),
                    {}};
    uint64_t threshold = ~uint64_t(0);
    if (0 < selected && selected < size) {
      if (size <= CHUNK) chooser.read(0);
      threshold = chooser.threshold(selected);
    }
    chooser.for_ranks([&](uint64_t rank, uint32_t entry) {
      const bool is_selected = selected > 0 && rank <= threshold;
      const int64_t at = start + chooser.list[entry];
      if (layer.selected && is_selected) layer.selected[at] = 1;
      if (!layer.selected && !is_selected) layer.set_class(at, NO_CLASS);
    });
    // No barrier is needed between segments. What a segment writes to shared memory before its first barrier is not
    // read after the last barrier of the segment before it.
  }
}

// ---- Memory

void Layer::shape(int64_t h, int64_t w, int64_t num_classes) {
  height = static_cast<int32_t>(h);
  width = static_cast<int32_t>(w);
  slots = static_cast<int32_t>(greater<int64_t>(num_classes, 1));
}

void Layer::take_zeroed(Scratch &scratch, int64_t batch) {
  sizes = scratch.take<uint32_t>(batch * slots);
  num_present = scratch.take<uint32_t>(batch);
  tickets = scratch.take<uint32_t>(batch);
  num_classified = scratch.take<unsigned long long>(1);
}

void Layer::take_lists(Scratch &scratch, int64_t batch) {
  present = scratch.take<Segment>(batch * most_present());
  pixels = scratch.take<uint32_t>(batch * num_pixels());
}

// select_nearest: classes and distances are copied, so that what follows finds them dense.
struct SelectMemory {
  Layers layers;
  int64_t zeroed;  // bytes that must be 0, at the start

  SelectMemory(Scratch &scratch, int64_t batch, int64_t height, int64_t width, int64_t num_classes) {
    layers.batch = static_cast<int32_t>(batch);
    layers.count = 1;
    Layer &layer = layers.layer[0] = {};
    layer.type = CONTEXTRAST_INT32;
    layer.shape(height, width, num_classes);
    layer.take_zeroed(scratch, batch);
    zeroed = scratch.used();
    layer.take_lists(scratch, batch);
    layer.classes = scratch.take<int32_t>(batch * height * width);
    layer.distance_sq = scratch.take<int32_t>(batch * height * width);
  }
};

// bane_negatives: errors are found in the layers' own output. With AT_FULL one plane of the labels' size, and its
// errors; else a plane for each layer.
struct BaneMemory {
  Layers layers, full;
  Planes planes;
  int32_t type;  // of the planes' maps
  int64_t zeroed;

  BaneMemory(Scratch &scratch, const ContextrastMap &labels, int64_t num_classes, const ContextrastLayer *list,
             int num_layers, int32_t negatives_type, int64_t *errors, int distance_at) {
    const int64_t batch = labels.batch;
    layers.batch = full.batch = planes.batch = static_cast<int32_t>(batch);
    for (int i = 0; i < num_layers; ++i) {
      if (list[i].height * list[i].width == 0) continue;
      Layer &layer = layers.layer[layers.count++] = {};
      layer.shape(list[i].height, list[i].width, num_classes);
      layer.take_zeroed(scratch, batch);
      layer.type = negatives_type;
      layer.classes = list[i].negatives;
      layer.errors = errors ? errors + i : nullptr;
    }
    type = distance_at == CONTEXTRAST_AT_FULL ? CONTEXTRAST_INT32 : negatives_type;
    if (distance_at == CONTEXTRAST_AT_FULL) {
      full.count = 1;
      full.layer[0] = {};
      full.layer[0].type = type;
      full.layer[0].height = static_cast<int32_t>(labels.height);
      full.layer[0].width = static_cast<int32_t>(labels.width);
      add_plane(full.layer[0], scratch);
    } else {
      for (int i = 0; i < layers.count; ++i) add_plane(layers.layer[i], scratch);
    }
    zeroed = scratch.used();
    for (int i = 0; i < planes.count; ++i) planes.plane[i].take_words(scratch, batch);
    for (int i = 0; i < layers.count; ++i) {
      Layer &layer = layers.layer[i];
      layer.take_lists(scratch, batch);
      layer.distance_sq = scratch.take<int32_t>(batch * layer.num_pixels());
      if (!full.count) connect(layer, planes.plane[i]);
    }
    if (full.count) {
      Layer &layer = full.layer[0];
      layer.classes = scratch.take<int32_t>(batch * layer.num_pixels());
      layer.distance_sq = scratch.take<int32_t>(batch * layer.num_pixels());
      connect(layer, planes.plane[0]);
    }
  }

 private:
  void add_plane(const Layer &layer, Scratch &scratch) {
    Plane &plane = planes.plane[planes.count++] = {};
    plane.height = layer.height;
    plane.width = layer.width;
    plane.take_tickets(scratch, planes.batch);
  }
  static void connect(const Layer &layer, Plane &plane) {
    plane.map = layer.classes;
    plane.none = none_of(layer.type);
    plane.stride_batch = layer.num_pixels();
    plane.stride_row = layer.width;
    plane.stride_column = 1;
    plane.distance = layer.distance_sq;
  }
};

// ---- Launches

LayersWork in_blocks(const Layers &layers, int pixels) {
  LayersWork parameters{layers, {}};
  for (int i = 0; i < layers.count; ++i)
    parameters.blocks.add(layers.batch * divide_up(layers.layer[i].num_pixels(), pixels));
  return parameters;
}

template <class Bits>
cudaError_t enqueue_errors(const Layers &layers, ErrorSource source, Bits infinity, cudaStream_t stream) {
  source.infinity = infinity;
  const LayersWork parameters = in_blocks(layers, BLOCK * PIXELS<Bits>);
  return launch(find_errors<Bits>, parameters.blocks.total(), BLOCK, 0, stream, parameters, source);
}

cudaError_t enqueue_errors(const Layers &layers, const ContextrastMap &predictions, const ContextrastMap &labels,
                           int64_t num_classes, int64_t ignore_index, cudaStream_t stream) {
  const ErrorSource source{predictions, labels, class_limit(num_classes, predictions.channels), ignore_index, 0};
  switch (predictions.type) {
    case CONTEXTRAST_FLOAT16: return enqueue_errors<int16_t>(layers, source, INFINITY_FLOAT16, stream);
    case CONTEXTRAST_BFLOAT16: return enqueue_errors<int16_t>(layers, source, INFINITY_BFLOAT16, stream);
    case CONTEXTRAST_FLOAT32: return enqueue_errors<int32_t>(layers, source, INFINITY_FLOAT32, stream);
    case CONTEXTRAST_FLOAT64: return enqueue_errors<int64_t>(layers, source, INFINITY_FLOAT64, stream);
    default: {
      const LayersWork parameters = in_blocks(layers, BLOCK * PIXELS<void>);
      return launch(find_errors<void>, parameters.blocks.total(), BLOCK, 0, stream, parameters, source);
    }
  }
}

cudaError_t enqueue_classes(const Layers &layers, const ClassSource &source, cudaStream_t stream) {
  const LayersWork parameters = in_blocks(layers, BLOCK * PIXELS<void>);
  return launch(read_classes, parameters.blocks.total(), BLOCK, 0, stream, parameters, source);
}

cudaError_t enqueue_selection(const Layers &layers, double ratio, const int64_t *seed, cudaStream_t stream) {
  LayersWork parameters = in_blocks(layers, BLOCK);
  const cudaError_t status = launch(place, parameters.blocks.total(), BLOCK, 0, stream, parameters);
  if (status != cudaSuccess) return status;
  parameters.blocks = {};
  for (int i = 0; i < layers.count; ++i)
    parameters.blocks.add(static_cast<int64_t>(layers.batch) * choosing_blocks(layers.layer[i]));
  return launch(choose, parameters.blocks.total(), CHOOSERS, 0, stream, parameters, ratio, seed);
}

ContextrastMap dense_map(const void *data, const Layers &layers) {
  const Layer &layer = layers.layer[0];
  return {data, layers.batch, 0, layer.height, layer.width, layer.num_pixels(), 0, layer.width, 1, CONTEXTRAST_INT32};
}

cudaError_t enqueue_negatives(BaneMemory &memory, const ContextrastMap &predictions, const ContextrastMap &labels,
                              int64_t num_classes, int64_t ignore_index, double ratio, bool bane, const int64_t *seed,
                              int device, cudaStream_t stream) {
  const bool full = memory.full.count > 0;
  const Layers &found_at = full ? memory.full : memory.layers;
  cudaError_t status = enqueue_errors(found_at, predictions, labels, num_classes, ignore_index, stream);
  if (status == cudaSuccess && bane)
    status = enqueue_distances(memory.planes, memory.type, false, true, device, stream);
  if (!bane)
    for (int i = 0; i < memory.layers.count; ++i) memory.layers.layer[i].distance_sq = nullptr;
  if (status == cudaSuccess && full) {
    const Layer &from = memory.full.layer[0];
    const ClassSource source{dense_map(from.classes, memory.full), dense_map(from.distance_sq, memory.full),
                             static_cast<uint64_t>(num_classes)};
    status = enqueue_classes(memory.layers, source, stream);
  }
  return status == cudaSuccess ? enqueue_selection(memory.layers, ratio, seed, stream) : status;
}

cudaStream_t stream_of(void *stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace
}  // namespace contextrast

extern "C" {

using namespace contextrast;

int contextrast_error_map_cuda(const ContextrastMap *predictions, const ContextrastMap *labels, int64_t num_classes,
                               int64_t ignore_index, int32_t *errors, int device, void *stream, char *error) {
  if (const int code = check_pair(*predictions, *labels, error)) return code;
  if (labels->batch <= 0 || labels->height * labels->width == 0) return CONTEXTRAST_OK;
  Layers layers;
  layers.batch = static_cast<int32_t>(labels->batch);
  layers.count = 1;
  layers.layer[0] = {};
  layers.layer[0].height = static_cast<int32_t>(labels->height);
  layers.layer[0].width = static_cast<int32_t>(labels->width);
  layers.layer[0].type = CONTEXTRAST_INT32;
  layers.layer[0].classes = errors;

  const OnDevice current(device);
  cudaError_t status = current.status();
  if (status == cudaSuccess)
    status = enqueue_errors(layers, *predictions, *labels, num_classes, ignore_index, stream_of(stream));
  return answer(status, error);
}

// A call with invalid arguments needs no scratch, so its size is 0.
int64_t contextrast_select_nearest_scratch_cuda(int64_t batch, int64_t height, int64_t width, int64_t num_classes) {
  char error[CONTEXTRAST_ERROR_SIZE];
  if (check_pixels("classes", height, width, error) || check_num_classes(num_classes, error)) return 0;
  Scratch scratch(nullptr);
  SelectMemory(scratch, batch, height, width, num_classes);
  return scratch.used();
}

int contextrast_select_nearest_cuda(const ContextrastMap *classes, const ContextrastMap *distance_sq, double ratio,
                                    int64_t num_classes, const int64_t *seed, uint8_t *selected, void *scratch,
                                    int device, void *stream, char *error) {
  if (const int code = check_selection(*classes, *distance_sq, num_classes, error)) return code;
  if (classes->batch <= 0 || classes->height * classes->width == 0) return CONTEXTRAST_OK;
  Scratch pieces(scratch);
  SelectMemory memory(pieces, classes->batch, classes->height, classes->width, num_classes);
  memory.layers.layer[0].selected = selected;

  const OnDevice current(device);
  cudaError_t status = current.status();
  if (status == cudaSuccess)
    status = cudaMemsetAsync(scratch, 0, static_cast<size_t>(memory.zeroed), stream_of(stream));
  if (status == cudaSuccess)
    status = enqueue_classes(memory.layers, {*classes, *distance_sq, static_cast<uint64_t>(num_classes)},
                             stream_of(stream));
  if (status == cudaSuccess) status = enqueue_selection(memory.layers, ratio, seed, stream_of(stream));
  return answer(status, error);
}

int64_t contextrast_bane_negatives_scratch_cuda(const ContextrastMap *labels, int64_t num_classes,
                                                const ContextrastLayer *layers, int num_layers, int type,
                                                int distance_at) {
  char error[CONTEXTRAST_ERROR_SIZE];
  if (check_sides("labels", labels->height, labels->width, error) ||
      check_layers(*labels, num_classes, layers, num_layers, type, error))
    return 0;
  Scratch scratch(nullptr);
  BaneMemory(scratch, *labels, num_classes, layers, num_layers, type, nullptr, distance_at);
  return scratch.used();
}

int contextrast_bane_negatives_cuda(const ContextrastMap *predictions, const ContextrastMap *labels,
                                    int64_t num_classes, int64_t ignore_index, const ContextrastLayer *layers,
                                    int num_layers, int type, int64_t *errors, double ratio, int negatives,
                                    int distance_at, const int64_t *seed, void *scratch, int device, void *stream,
                                    char *error) {
  if (const int code = check_pair(*predictions, *labels, error)) return code;
  if (const int code = check_layers(*labels, num_classes, layers, num_layers, type, error)) return code;
  if (labels->batch <= 0 || labels->height * labels->width == 0) return CONTEXTRAST_OK;
  Scratch pieces(scratch);
  BaneMemory memory(pieces, *labels, num_classes, layers, num_layers, type, errors, distance_at);
  if (memory.layers.count == 0) return CONTEXTRAST_OK;

  const OnDevice current(device);
  cudaError_t status = current.status();
  if (status == cudaSuccess)
    status = cudaMemsetAsync(scratch, 0, static_cast<size_t>(memory.zeroed), stream_of(stream));
  if (status == cudaSuccess)
    status = enqueue_negatives(memory, *predictions, *labels, num_classes, ignore_index, ratio,
                               negatives == CONTEXTRAST_BANE, seed, device, stream_of(stream));
  return answer(status, error);
}

}  // extern "C"
