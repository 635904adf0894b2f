// The distance functions on CUDA where edt.cu's kernels for maps of square pixels do not serve: volumes, sampling,
// indices, floating types, unsigned integers of more than 8 bits.
//   1. mark    a thread reads 32 pixels of a column and writes their words.
//   2. carry   a thread carries the nearest sites along a column.
//   3. solve   a warp computes one line: its costs go to shared memory, a window settles what is near, and the tiles of
//              32 pixels that it leaves open are searched between pivots. First along y (volumes), then along x.
#include <type_traits>

#include "edt.cuh"
#include "volume.h"

namespace contextrast {
namespace {

constexpr int TILE = WARP;
constexpr int WINDOW = 8, WINDOW_BESIDE_OPEN = 2;  // steps before a tile is left to the search
constexpr int MOST_WARPS = 4;                      // of a block that solves lines

struct VolumeWork : Volume {
  uint32_t *sites, *carries, *wanted_bits;  // (B, bands, y, x); carries null for one band, wanted_bits null: all pixels
  void *costs;                         // (B, z, y, x) after the search along y; null for maps
  int32_t *keys;                       // likewise, if indices are asked for

  VolumeWork(const ContextrastVolume &volume, const ContextrastDistance &asked, Scratch &scratch, bool edges)
      : Volume(volume, asked) {
    const int64_t words = batch * bands() * plane(), pixels = size[1] > 1 ? batch * image() : 0;
    sites = scratch.take<uint32_t>(words);
    carries = bands() > 1 ? scratch.take<uint32_t>(words) : nullptr;
    wanted_bits = edges ? scratch.take<uint32_t>(words) : nullptr;
    costs = nullptr;
    if (pixels && metric.integral) costs = scratch.take<int32_t>(pixels);
    if (pixels && !metric.integral) costs = scratch.take<double>(pixels);
    keys = pixels && has_keys() ? scratch.take<int32_t>(pixels) : nullptr;
  }
};
static_assert(sizeof(VolumeWork) <= 4096, "parameters of a kernel");

// ---- 1. Mark

// `counted`: the bits of a value that make it nonzero. `negative`: the bit of negative classes, or 0.
template <class Bits>
__global__ void __launch_bounds__(BLOCK)
    mark_volume(const __grid_constant__ VolumeWork volume, Bits counted, Bits negative) {
  const int64_t word = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x, plane = volume.plane();
  if (word >= volume.batch * volume.bands() * plane) return;
  const int64_t band = word / plane, image = band / volume.bands(), in_plane = word % plane;
  const int top = static_cast<int>(band % volume.bands()) * BAND, y = static_cast<int>(in_plane / volume.size[2]);
  const int x = static_cast<int>(in_plane % volume.size[2]), rows = lesser(BAND, volume.size[0] - top);
  const Bits *from = static_cast<const Bits *>(volume.data) + image * volume.stride_batch + top * volume.stride[0] +
                     y * volume.stride[1] + x * volume.stride[2];
  uint32_t sites = 0, wanted = 0;
  if (!volume.wanted_bits) {
#pragma unroll 8
    for (int row = 0; row < rows; ++row, from += volume.stride[0])
      sites |= static_cast<uint32_t>((__ldg(from) & counted) == 0) << row;
  } else {
    // Beyond the border lies the border's own pixel.
    const int64_t above = y > 0 ? -volume.stride[1] : 0, below = y + 1 < volume.size[1] ? volume.stride[1] : 0;
    const int64_t left = x > 0 ? -volume.stride[2] : 0, right = x + 1 < volume.size[2] ? volume.stride[2] : 0;
    Bits here = __ldg(from), up = top > 0 ? __ldg(from - volume.stride[0]) : here;
#pragma unroll 1
    for (int row = 0; row < rows; ++row, from += volume.stride[0]) {
      const Bits down = top + row + 1 < volume.size[0] ? __ldg(from + volume.stride[0]) : here;
      const bool differs = (here != up) | (here != down) | (here != __ldg(from + above)) |
                           (here != __ldg(from + below)) | (here != __ldg(from + left)) | (here != __ldg(from + right));
      const bool is_wanted = (here & negative) == 0;
      sites |= static_cast<uint32_t>(is_wanted && differs) << row;
      wanted |= static_cast<uint32_t>(is_wanted) << row;
      up = here;
      here = down;
    }
    volume.wanted_bits[word] = wanted;
  }
  volume.sites[word] = sites;
}

// ---- 2. Carry

__global__ void __launch_bounds__(BLOCK) carry_volume(const __grid_constant__ VolumeWork volume) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x, plane = volume.plane();
  if (column >= volume.batch * plane) return;
  const int bands = static_cast<int>(volume.bands());
  const int64_t first = column / plane * bands * plane + column % plane;
  uint32_t above = NO_SITE;
  for (int band = 0; band < bands; ++band) {
    volume.carries[first + band * plane] = pack_carry(above, 0);
    above = pass_down(volume.sites[first + band * plane], above);
  }
  uint32_t below = NO_SITE;
  for (int band = bands - 1; band >= 0; --band) {
    volume.carries[first + band * plane] |= pack_carry(0, below);
    below = pass_up(volume.sites[first + band * plane], below);
  }
}

// ---- 3. Solve

// Where the pixels of a line lie in the words and in the image, how far apart, and the bit of their plane.
struct Line {
  int64_t word, pixel;
  int32_t step, size, bit, z, y, x;  // z, y, x of its first pixel
};

// The cost of a pixel over its column alone, and its key.
template <class Cost>
__device__ Found<Cost> of_column(const VolumeWork &volume, const Line &line, int u) {
  const int64_t word = line.word + static_cast<int64_t>(u) * line.step;
  const uint32_t carry = volume.carries ? volume.carries[word] : pack_carry(NO_SITE, NO_SITE);
  const int32_t offset = column_offset(volume.sites[word], line.bit, carry);
  if (offset == NO_OFFSET) return {Costs<Cost>::none, INT32_MAX};
  const int64_t key = (line.z + offset) * volume.plane() + static_cast<int64_t>(line.y) * volume.size[2] + line.x +
                      static_cast<int64_t>(u) * line.step;
  return {Costs<Cost>::apart(Costs<Cost>::side(volume.metric, 0), offset), static_cast<int32_t>(key)};
}

// The best over the warp.
template <class Cost>
__device__ Found<Cost> best_of_warp(Found<Cost> own) {
  for (int offset = WARP / 2; offset; offset /= 2) {
    const Found<Cost> other = {__shfl_xor_sync(ALL_LANES, own.cost, offset),
                               __shfl_xor_sync(ALL_LANES, own.key, offset)};
    own = better(own, other);
  }
  return own;
}

// The warp finds each pixel's least cost over a line. key_of(u): of pixel u; is_wanted(x): whether pixel x is asked
// for; write(x, found). costs are in shared memory, and so are the best places of the pivots.
template <bool KEYS, class Cost, class KeyOf, class IsWanted, class Write>
__device__ void solve_line(const Cost *costs, int32_t *places, int size, Cost side, bool bisects, int lane,
                           const KeyOf &key_of, const IsWanted &is_wanted, const Write &write) {
  const int tiles = (size + TILE - 1) / TILE;
  const auto candidate = [&](int x, int u) {
    return Found<Cost>{Costs<Cost>::sum(costs[u], Costs<Cost>::apart(side, x - u)), KEYS ? key_of(u) : 0};
  };
  // Whether pixels `next` away could still improve it.
  const auto is_open = [&](const Found<Cost> &found, int x, int next) {
    if (x < next && x + next >= size) return false;
    const Cost least = Costs<Cost>::apart(side, next);
    return KEYS ? !(found.cost < least) : found.cost > least;
  };
  uint32_t open_tiles = 0;  // bit i of lane l: tile i * 32 + l
  bool any_open = false;
  for (int tile = 0; tile < tiles; ++tile) {
    const int x = tile * TILE + lane;
    const bool asked = x < size && is_wanted(x);
    Found<Cost> found = {Costs<Cost>::none, INT32_MAX};
    bool open = false;
    if (asked) {
      found = candidate(x, x);
      const int steps = any_open ? WINDOW_BESIDE_OPEN : WINDOW;
      open = is_open(found, x, 1);
      for (int k = 1; open && k <= steps; ++k) {
        if (x >= k) found = better(found, candidate(x, x - k));
        if (x + k < size) found = better(found, candidate(x, x + k));
        open = is_open(found, x, k + 1);
      }
    }
    if (__any_sync(ALL_LANES, open)) {
      any_open = true;
      if (lane == tile % WARP) open_tiles |= 1u << tile / WARP;
    } else if (x < size) {
      write(x, asked, found);
    }
  }
  if (!any_open) return;

  if (bisects) {
    const auto pivot = [&](int j, int first, int last) {
      const Found<Cost> best =
          best_of_warp(search(costs, static_cast<const int32_t *>(nullptr), side, j * TILE, first, last, lane, WARP));
      if (lane == 0) places[j] = lesser(best.key, last);
      __syncwarp();
    };
    pivot(0, 0, size - 1);
    // The last tile has no pixel behind it that could be a pivot. Its last pixel cannot serve as one: a pivot takes the
    // first of equally good pixels, and later ones would be left out.
    if (lane == 0) places[tiles] = size - 1;
    __syncwarp();
    for (int step = first_step(tiles); step; step /= 2)
      for (int j = step; j < tiles; j += 2 * step) pivot(j, places[j - step], places[lesser(j + step, tiles)]);
  }
  for (int tile = 0; tile < tiles; ++tile) {
    if (!(__shfl_sync(ALL_LANES, open_tiles, tile % WARP) >> tile / WARP & 1)) continue;
    const int x = tile * TILE + lane;
    if (x >= size) continue;
    const bool asked = is_wanted(x);
    Found<Cost> found = {Costs<Cost>::none, INT32_MAX};
    const int last = bisects ? places[tile + 1] : size - 1;
    for (int u = bisects ? places[tile] : 0; asked && u <= last; ++u) found = better(found, candidate(x, u));
    write(x, asked, found);
  }
}

// Shared memory of a warp: costs, then pivots.
template <class Cost>
__host__ __device__ inline int line_bytes(int size) {
  const int pivots = (size + TILE - 1) / TILE + 1;
  return (size * static_cast<int>(sizeof(Cost)) + pivots * static_cast<int>(sizeof(int32_t)) + 15) / 16 * 16;
}

template <class Cost, bool KEYS>
__global__ void __launch_bounds__(MOST_WARPS *WARP) solve_along_y(const __grid_constant__ VolumeWork volume) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, width = volume.size[2], size = volume.size[1];
  const int64_t number = static_cast<int64_t>(blockIdx.x) * (blockDim.x / WARP) + warp;
  if (number >= volume.batch * volume.size[0] * width) return;
  const int64_t plane = number / width, image = plane / volume.size[0];
  Line line;
  line.z = static_cast<int>(plane - image * volume.size[0]);
  line.y = 0;
  line.x = static_cast<int>(number - plane * width);
  line.step = width;
  line.size = size;
  line.bit = line.z % BAND;
  line.word = (image * volume.bands() + line.z / BAND) * volume.plane() + line.x;
  line.pixel = (image * volume.size[0] + line.z) * volume.plane() + line.x;

  Cost *const costs = reinterpret_cast<Cost *>(dynamic_shared<char>() + warp * line_bytes<Cost>(size));
  for (int u = lane; u < size; u += WARP) costs[u] = of_column<Cost>(volume, line, u).cost;
  __syncwarp();
  Cost *const result = static_cast<Cost *>(volume.costs) + line.pixel;
  const auto is_wanted = [&](int y) {
    return !volume.wanted_bits || (volume.wanted_bits[line.word + static_cast<int64_t>(y) * width] >> line.bit & 1);
  };
  solve_line<KEYS>(
      costs, reinterpret_cast<int32_t *>(costs + size), size, Costs<Cost>::side(volume.metric, 1),
      volume.metric.search[1] != 0, lane, [&](int u) { return of_column<Cost>(volume, line, u).key; }, is_wanted,
      [&](int y, bool, const Found<Cost> &found) {
        result[static_cast<int64_t>(y) * width] = found.cost;
        if (KEYS) volume.keys[line.pixel + static_cast<int64_t>(y) * width] = found.key;
      });
}

template <class Cost>
__device__ void write_result(const VolumeWork &volume, int64_t at, bool asked, Cost cost) {
  if (!volume.wanted.squared)
    static_cast<float *>(volume.wanted.distance)[at] =
        asked ? in_pixels(cost, volume.metric) : static_cast<float>(CONTEXTRAST_OUTSIDE);
  else if (volume.wanted.sampled)
    static_cast<double *>(volume.wanted.distance)[at] =
        asked ? in_pixels_squared(cost, volume.metric) : static_cast<double>(CONTEXTRAST_OUTSIDE);
  else
    static_cast<int32_t *>(volume.wanted.distance)[at] = !asked           ? CONTEXTRAST_OUTSIDE
                                                         : has_site(cost) ? static_cast<int32_t>(cost)
                                                                          : CONTEXTRAST_NO_EDGE;
}

template <class Cost>
__device__ void write_nearest(const VolumeWork &volume, int64_t at, const Found<Cost> &found) {
  const bool none = !has_site(found.cost);
  const int64_t plane = volume.plane();
  const int32_t z = static_cast<int32_t>(found.key / plane), in_plane = static_cast<int32_t>(found.key % plane);
  const int32_t places[3] = {z, in_plane / volume.size[2], in_plane % volume.size[2]};
#pragma unroll
  for (int axis = 0; axis < 3; ++axis)
    if (volume.wanted.nearest[axis]) volume.wanted.nearest[axis][at] = none ? -1 : places[axis];
}

template <class Cost, bool KEYS>
__global__ void __launch_bounds__(MOST_WARPS *WARP) solve_along_x(const __grid_constant__ VolumeWork volume) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, size = volume.size[2], height = volume.size[1];
  const int64_t number = static_cast<int64_t>(blockIdx.x) * (blockDim.x / WARP) + warp;
  if (number >= volume.batch * volume.size[0] * height) return;
  const int64_t plane = number / height, image = plane / volume.size[0];
  Line line;
  line.z = static_cast<int>(plane - image * volume.size[0]);
  line.y = static_cast<int>(number - plane * height);
  line.x = 0;
  line.step = 1;
  line.size = size;
  line.bit = line.z % BAND;
  line.word = (image * volume.bands() + line.z / BAND) * volume.plane() + static_cast<int64_t>(line.y) * size;
  line.pixel = number * size;

  const bool first = height == 1;  // no other axis than the columns has been searched
  Cost *const costs = reinterpret_cast<Cost *>(dynamic_shared<char>() + warp * line_bytes<Cost>(size));
  for (int u = lane; u < size; u += WARP)
    costs[u] = first ? of_column<Cost>(volume, line, u).cost : static_cast<const Cost *>(volume.costs)[line.pixel + u];
  __syncwarp();
  solve_line<KEYS>(
      costs, reinterpret_cast<int32_t *>(costs + size), size, Costs<Cost>::side(volume.metric, 2),
      volume.metric.search[2] != 0, lane,
      [&](int u) { return first ? of_column<Cost>(volume, line, u).key : volume.keys[line.pixel + u]; },
      [&](int x) { return !volume.wanted_bits || (volume.wanted_bits[line.word + x] >> line.bit & 1); },
      [&](int x, bool asked, const Found<Cost> &found) {
        write_result(volume, line.pixel + x, asked, found.cost);
        if (KEYS) write_nearest(volume, line.pixel + x, found);
      });
}

// ---- Launches

template <class Bits>
cudaError_t enqueue_mark(const VolumeWork &volume, uint64_t counted, uint64_t negative, cudaStream_t stream) {
  return launch(mark_volume<Bits>, divide_up(volume.batch * volume.bands() * volume.plane(), BLOCK), BLOCK, 0, stream,
                volume, static_cast<Bits>(counted), static_cast<Bits>(negative));
}

cudaError_t enqueue_mark(const VolumeWork &volume, int32_t type, cudaStream_t stream) {
  constexpr uint64_t ALL = ~uint64_t(0);
  switch (type) {
    case CONTEXTRAST_UINT8: return enqueue_mark<uint8_t>(volume, ALL, 0, stream);
    case CONTEXTRAST_INT8: return enqueue_mark<uint8_t>(volume, ALL, 0x80, stream);
    case CONTEXTRAST_UINT16: return enqueue_mark<uint16_t>(volume, ALL, 0, stream);
    case CONTEXTRAST_INT16: return enqueue_mark<uint16_t>(volume, ALL, 0x8000, stream);
    case CONTEXTRAST_FLOAT16:
    case CONTEXTRAST_BFLOAT16: return enqueue_mark<uint16_t>(volume, 0x7FFF, 0, stream);
    case CONTEXTRAST_UINT32: return enqueue_mark<uint32_t>(volume, ALL, 0, stream);
    case CONTEXTRAST_INT32: return enqueue_mark<uint32_t>(volume, ALL, 0x80000000, stream);
    case CONTEXTRAST_FLOAT32: return enqueue_mark<uint32_t>(volume, 0x7FFFFFFF, 0, stream);
    case CONTEXTRAST_UINT64: return enqueue_mark<unsigned long long>(volume, ALL, 0, stream);
    case CONTEXTRAST_INT64: return enqueue_mark<unsigned long long>(volume, ALL, uint64_t(1) << 63, stream);
    default: return enqueue_mark<unsigned long long>(volume, ALL >> 1, 0, stream);
  }
}

template <class Cost>
cudaError_t enqueue_lines(void (*kernel)(VolumeWork), const VolumeWork &volume, int axis, int device,
                          cudaStream_t stream) {
  int limit = 0;  // of a block's shared memory; more than the usual 48 KiB must be asked for
  cudaError_t status = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;
  const int bytes = line_bytes<Cost>(volume.size[axis]), warps = greater(lesser(MOST_WARPS, limit / bytes), 1);
  if (warps * bytes > 48 * 1024) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
    if (status != cudaSuccess) return status;
  }
  const int64_t lines = volume.batch * volume.size[0] * (axis == 1 ? volume.size[2] : volume.size[1]);
  return launch(kernel, divide_up(lines, warps), warps * WARP, static_cast<size_t>(warps * bytes), stream, volume);
}

template <class Cost, bool KEYS>
cudaError_t enqueue_solve(const VolumeWork &volume, int device, cudaStream_t stream) {
  if (volume.size[1] > 1) {
    const cudaError_t status = enqueue_lines<Cost>(solve_along_y<Cost, KEYS>, volume, 1, device, stream);
    if (status != cudaSuccess) return status;
  }
  return enqueue_lines<Cost>(solve_along_x<Cost, KEYS>, volume, 2, device, stream);
}

}  // namespace

int64_t volume_scratch(const ContextrastVolume &given, const ContextrastDistance &wanted, bool edges) {
  Scratch scratch(nullptr);
  VolumeWork(given, wanted, scratch, edges);
  return scratch.used();
}

cudaError_t enqueue_volume(const ContextrastVolume &given, const ContextrastDistance &wanted, bool edges, void *memory,
                           int device, cudaStream_t stream) {
  Scratch scratch(memory);
  const VolumeWork volume(given, wanted, scratch, edges);
  cudaError_t status = enqueue_mark(volume, given.type, stream);
  if (status == cudaSuccess && volume.carries)
    status = launch(carry_volume, divide_up(volume.batch * volume.plane(), BLOCK), BLOCK, 0, stream, volume);
  if (status != cudaSuccess) return status;
  if (volume.metric.integral)
    return volume.has_keys() ? enqueue_solve<int32_t, true>(volume, device, stream)
                             : enqueue_solve<int32_t, false>(volume, device, stream);
  return volume.has_keys() ? enqueue_solve<double, true>(volume, device, stream)
                           : enqueue_solve<double, false>(volume, device, stream);
}

}  // namespace contextrast
