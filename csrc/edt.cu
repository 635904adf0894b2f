// edge_distance and distance_transform of maps with square pixels on CUDA: two kernels, whatever the number of layers.
// volume.cu has volumes, sampling, indices, floating types and unsigned integers of more than 8 bits.
//   1. mark    a warp reads 32 x 32 pixels and writes their sites as words, 3/8 of a byte a pixel. The last warp to
//              finish in a strip of 32 columns carries the nearest sites up and down it.
//   2. solve   a warp computes one row: parabolas from the words, then the window for each tile of 32 pixels, then, for
//              the tiles that it leaves open, the pivots by bisection and one sweep a tile between two of them.
// Memory: the map is read once and the distances are written once; the words stay in the caches, where each is read by
// the 32 rows that it covers.
#include <type_traits>

#include "edt.cuh"
#include "errors.h"
#include "lines.h"

namespace contextrast {
namespace {

constexpr int BAND = 32;               // rows of a word
constexpr int TILE = WARP;             // pixels that a warp solves at once, and the distance between pivots
constexpr int AHEAD = 8;               // independent loads that a thread keeps in flight
constexpr int WINDOW = 8;              // steps before a tile is left to the bisection: about what its sweep costs
constexpr int WINDOW_IN_HARD_ROW = 2;  // the same in a row that already has an open tile

struct PlanesWork {
  Planes planes;
  LayerBlocks blocks;
  int32_t row_words;  // shared memory of a warp of `solve`, in words
};
static_assert(sizeof(PlanesWork) <= 4096, "parameters of a kernel");

__host__ __device__ inline int bands_of(int height) { return (height + BAND - 1) / BAND; }
__host__ __device__ inline int tiles_of(int width) { return (width + TILE - 1) / TILE; }

// ---- 1. Mark

// Scans one column of words in both directions at once, because each step of either waits for memory.
__device__ void carry(const uint32_t *sites, Carry *carries, int bands, int64_t width) {
  uint32_t above = NO_SITE, below = NO_SITE;
  for (int start = 0; start < bands; start += AHEAD) {
    uint32_t downward[AHEAD], upward[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int band = lesser(start + i, bands - 1);
      downward[i] = __ldcg(sites + band * width);  // from the L2 cache: other multiprocessors wrote them
      upward[i] = __ldcg(sites + (bands - 1 - band) * width);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
      if (start + i < bands) {
        carries[(start + i) * width].above = static_cast<uint16_t>(above);
        carries[(bands - 1 - start - i) * width].below = static_cast<uint16_t>(below);
        above = pass_down(downward[i], above);
        below = pass_up(upward[i], below);
      }
  }
}

template <class T>
__global__ void __launch_bounds__(BLOCK) mark(const __grid_constant__ PlanesWork work, bool zeros) {
  const BlockOfLayer mine = work.blocks.find(blockIdx.x);
  const Plane &plane = work.planes.plane[mine.layer];
  const int height = plane.height, width = plane.width, bands = bands_of(height), strips = tiles_of(width);
  const int lane = threadIdx.x % WARP;
  const int64_t square = static_cast<int64_t>(mine.block) * (BLOCK / WARP) + threadIdx.x / WARP;
  if (square >= static_cast<int64_t>(work.planes.batch) * bands * strips) return;
  const int strip = static_cast<int>(square % strips), band = static_cast<int>(square / strips % bands);
  const int64_t image = square / strips / bands;
  const int top = band * BAND, x = strip * WARP + lane;

  // Reading beyond the border gives the border's own pixel, as is_edge wants it.
  using Value = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  const auto column = [&](int c) {
    return static_cast<const T *>(plane.map) + image * plane.stride_batch +
           greater(lesser(c, width - 1), 0) * plane.stride_column;
  };
  const auto read = [&](const T *from, int row) {
    return static_cast<Value>(__ldg(from + greater(lesser(row, height - 1), 0) * plane.stride_row));
  };
  const bool outer = lane == 0 || lane == WARP - 1;  // with a neighbour that no lane holds
  const T *const own = column(x), *const beside = column(lane == 0 ? x - 1 : x + 1);

  uint32_t sites = 0, wanted = 0;
  Value up = read(own, top - 1), here = read(own, top);
#pragma unroll 1
  for (int start = 0; start < BAND; start += AHEAD) {
    Value below[AHEAD], outside[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      below[i] = read(own, top + start + i + 1);
      outside[i] = outer ? read(beside, top + start + i) : Value(0);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      Value left = __shfl_up_sync(ALL_LANES, here, 1), right = __shfl_down_sync(ALL_LANES, here, 1);
      if (lane == 0) left = outside[i];
      if (lane == WARP - 1) right = outside[i];
      const bool is_code_of_none = sizeof(T) < sizeof(int64_t) && here == plane.none;
      const bool is_wanted = zeros || (here >= Value(0) && !is_code_of_none);
      const bool site = zeros ? here == Value(0) : is_wanted && is_edge(here, up, below[i], left, right);
      sites |= static_cast<uint32_t>(site) << (start + i);
      wanted |= static_cast<uint32_t>(is_wanted) << (start + i);
      up = here;
      here = below[i];
    }
  }
  if (height - top < BAND) {
    const uint32_t rows = (1u << (height - top)) - 1;
    sites &= rows;
    wanted &= rows;
  }

  const int64_t first_word = image * bands * width + x;  // of the column
  if (x < width) {
    plane.sites[first_word + static_cast<int64_t>(band) * width] = sites;
    plane.wanted[first_word + static_cast<int64_t>(band) * width] = wanted;
  }
  if (is_last_warp(plane.tickets + image * strips + strip, static_cast<uint32_t>(bands)) && x < width)
    carry(plane.sites + first_word, plane.carries + first_word, bands, width);
}

// ---- 2. Solve

template <class Distance>
__device__ Distance result(int32_t best) {
  if constexpr (std::is_same_v<Distance, int32_t>)
    return squared_distance(best);
  else
    return distance_of(squared_distance(best));
}

// The warp finds the column of least cost for pixel x.
__device__ int best_column(const int32_t *parabolas, int x, int first, int last, int lane) {
  const Candidate own = lane_candidate(parabolas, x, first, last, lane, WARP);
  const int32_t least = __reduce_min_sync(ALL_LANES, own.cost);
  return __reduce_min_sync(ALL_LANES, own.cost == least ? own.column : INT32_MAX);
}

// The warp solves the pivots from..to. The rest of the row gives no bounds for them.
__device__ void bisect(const int32_t *parabolas, int last, int from, int to, int lane, int32_t *columns) {
  const auto solve = [&](int j, int first_column, int last_column) {
    const int best = best_column(parabolas, pivot_column(0, last, TILE, j), first_column, last_column, lane);
    if (lane == 0) columns[j] = best;
    __syncwarp();
  };
  solve(from, 0, last);
  solve(to, columns[from], last);
  const int count = to - from;
  for (int step = first_step(count); step; step /= 2)
    for (int j = step; j < count; j += 2 * step)
      solve(from + j, columns[from + j - step], columns[from + lesser(j + step, count)]);
}

template <class Distance>
__global__ void __launch_bounds__(BLOCK, 4) solve(const __grid_constant__ PlanesWork work) {
  const BlockOfLayer mine = work.blocks.find(blockIdx.x);
  const Plane &plane = work.planes.plane[mine.layer];
  const int height = plane.height, width = plane.width, tiles = tiles_of(width);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64_t line = static_cast<int64_t>(mine.block) * (blockDim.x / WARP) + warp;
  if (line >= static_cast<int64_t>(work.planes.batch) * height) return;
  const int64_t image = line / height;
  const int row = static_cast<int>(line % height), bit = row % BAND;

  int32_t *const parabolas = dynamic_shared<int32_t>() + warp * work.row_words;
  int32_t *const columns = parabolas + width;                                  // of the pivots
  uint32_t *const wanted = reinterpret_cast<uint32_t *>(columns + tiles + 1);  // a bit a pixel, a word a tile
  const int64_t words = (image * bands_of(height) + row / BAND) * width;
  Distance *const distance = static_cast<Distance *>(plane.distance) + line * width;

#pragma unroll 1
  for (int start = 0; start < tiles; start += AHEAD) {
    uint32_t sites[AHEAD], wanted_words[AHEAD];
    Carry carries[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int64_t word = words + lesser((start + i) * TILE + lane, width - 1);
      sites[i] = plane.sites[word];
      wanted_words[i] = plane.wanted[word];
      carries[i] = plane.carries[word];
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      if (start + i >= tiles) break;
      const int x = (start + i) * TILE + lane;
      const uint32_t carry = pack_carry(carries[i].above, carries[i].below);
      if (x < width) parabolas[x] = parabola(column_distance(sites[i], bit, carry), x);
      const uint32_t wanted_in_row = __ballot_sync(ALL_LANES, x < width && (wanted_words[i] >> bit & 1));
      if (lane == 0) wanted[start + i] = wanted_in_row;
    }
  }
  __syncwarp();

  const auto is_wanted = [&](int tile) { return (wanted[tile] >> lane & 1) != 0; };
  uint32_t hard = 0;  // bit i of lane l: tile i * 32 + l is left open
  bool hard_row = false;
  for (int tile = 0; tile < tiles; ++tile) {
    const int x = tile * TILE + lane;
    int32_t best = 0;
    const bool proven =
        !is_wanted(tile) || row_window(parabolas, 0, width - 1, x, hard_row ? WINDOW_IN_HARD_ROW : WINDOW, best);
    if (!__all_sync(ALL_LANES, proven)) {
      hard_row = true;
      if (lane == tile % WARP) hard |= 1u << tile / WARP;
    } else if (x < width) {
      distance[x] = is_wanted(tile) ? result<Distance>(best) : Distance(CONTEXTRAST_OUTSIDE);
    }
  }
  if (!hard_row) return;

  const int first_tile = __reduce_min_sync(ALL_LANES, hard ? trailing_zeros(hard) * WARP + lane : INT32_MAX);
  const int last_tile = __reduce_max_sync(ALL_LANES, hard ? (31 - leading_zeros(hard)) * WARP + lane : -1);
  bisect(parabolas, width - 1, first_tile, last_tile + 1, lane, columns);
  for (int tile = first_tile; tile <= last_tile; ++tile) {
    if (!(__shfl_sync(ALL_LANES, hard, tile % WARP) >> tile / WARP & 1)) continue;
    const int x = tile * TILE + lane;
    if (x >= width) continue;
    distance[x] = is_wanted(tile) ? result<Distance>(least_cost(parabolas, x, columns[tile], columns[tile + 1]))
                                  : Distance(CONTEXTRAST_OUTSIDE);
  }
}

// ---- Launches

template <class T>
cudaError_t enqueue_mark(const PlanesWork &parameters, bool zeros, cudaStream_t stream) {
  return launch(mark<T>, parameters.blocks.total(), BLOCK, 0, stream, parameters, zeros);
}

template <class Distance>
cudaError_t enqueue_solve(PlanesWork parameters, int device, cudaStream_t stream) {
  const Planes &planes = parameters.planes;
  int widest = 0;
  for (int i = 0; i < planes.count; ++i) widest = greater(widest, planes.plane[i].width);
  parameters.row_words = widest + 2 * tiles_of(widest) + 1;
  const int row_bytes = parameters.row_words * static_cast<int>(sizeof(int32_t));
  int limit = 0;  // of a block's shared memory; more than the usual 48 KiB must be asked for
  cudaError_t status = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;
  const int warps = greater(lesser(BLOCK / WARP, limit / row_bytes), 1);
  if (warps * row_bytes > 48 * 1024) {
    // Every call sets the same value, so that calls from several threads do not lower each other's limit.
    status = cudaFuncSetAttribute(solve<Distance>, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
    if (status != cudaSuccess) return status;
  }
  parameters.blocks = {};
  for (int i = 0; i < planes.count; ++i)
    parameters.blocks.add(divide_up(static_cast<int64_t>(planes.batch) * planes.plane[i].height, warps));
  return launch(solve<Distance>, parameters.blocks.total(), warps * WARP, static_cast<size_t>(warps * row_bytes),
                stream, parameters);
}

// ---- edge_distance and distance_transform

// The memory of one map.
struct OneMap {
  Planes planes;
  int64_t zeroed;  // bytes that must be 0, at the start

  OneMap(Scratch &scratch, int64_t batch, int64_t height, int64_t width) {
    planes.batch = static_cast<int32_t>(batch);
    planes.count = 1;
    planes.plane[0] = {};
    planes.plane[0].height = static_cast<int32_t>(height);
    planes.plane[0].width = static_cast<int32_t>(width);
    planes.plane[0].take_tickets(scratch, batch);
    zeroed = scratch.used();
    planes.plane[0].take_words(scratch, batch);
  }
};

// Whether these kernels can answer: they compute distances, without indices, of maps of integers with square pixels.
// volume.cu computes the rest.
bool is_map(const ContextrastVolume &volume, const ContextrastDistance &wanted) {
  return volume.size[0] == 1 && !wanted.sampled && !wanted.nearest[0] && !wanted.nearest[1] && !wanted.nearest[2] &&
         is_integer(volume.type);
}

bool is_empty(const ContextrastVolume &volume) {
  return volume.batch <= 0 || volume.size[0] * volume.size[1] * volume.size[2] == 0;
}

cudaError_t enqueue_map(const ContextrastVolume &volume, bool zeros, const ContextrastDistance &wanted, void *memory,
                        int device, cudaStream_t stream) {
  Scratch scratch(memory);
  OneMap one(scratch, volume.batch, volume.size[1], volume.size[2]);
  Plane &plane = one.planes.plane[0];
  plane.map = volume.data;
  plane.none = none_of(CONTEXTRAST_INT32);
  plane.stride_batch = volume.stride_batch;
  plane.stride_row = volume.stride[1];
  plane.stride_column = volume.stride[2];
  plane.distance = wanted.distance;
  const cudaError_t status = cudaMemsetAsync(memory, 0, static_cast<size_t>(one.zeroed), stream);
  if (status != cudaSuccess) return status;
  return enqueue_distances(one.planes, volume.type, zeros, wanted.squared != 0, device, stream);
}

int transform(const char *name, const ContextrastVolume &volume, bool zeros, const ContextrastDistance &wanted,
              void *memory, int device, void *stream, char *error) {
  if (const int code = check_volume(name, volume, !zeros, error)) return code;
  if (const int code = check_wanted(wanted, !zeros, error)) return code;
  if (is_empty(volume)) return CONTEXTRAST_OK;
  const OnDevice current(device);
  const auto on = static_cast<cudaStream_t>(stream);
  cudaError_t status = current.status();
  if (status == cudaSuccess)
    status = is_map(volume, wanted) ? enqueue_map(volume, zeros, wanted, memory, device, on)
                                    : enqueue_volume(volume, wanted, !zeros, memory, device, on);
  return answer(status, error);
}

}  // namespace

void Plane::take_tickets(Scratch &scratch, int64_t batch) { tickets = scratch.take<uint32_t>(batch * tiles_of(width)); }

void Plane::take_words(Scratch &scratch, int64_t batch) {
  const int64_t count = batch * bands_of(height) * width;
  sites = scratch.take<uint32_t>(count);
  wanted = scratch.take<uint32_t>(count);
  carries = scratch.take<Carry>(count);
}

cudaError_t enqueue_distances(const Planes &planes, int32_t type, bool zeros, bool squared, int device,
                              cudaStream_t stream) {
  PlanesWork parameters{planes, {}, 0};
  for (int i = 0; i < planes.count; ++i) {
    const Plane &plane = planes.plane[i];
    const int64_t squares = static_cast<int64_t>(planes.batch) * bands_of(plane.height) * tiles_of(plane.width);
    parameters.blocks.add(divide_up(squares, BLOCK / WARP));
  }
  cudaError_t status = cudaSuccess;
  with_integer(type, [&](auto zero) { status = enqueue_mark<decltype(zero)>(parameters, zeros, stream); });
  if (status != cudaSuccess) return status;
  return squared ? enqueue_solve<int32_t>(parameters, device, stream)
                 : enqueue_solve<float>(parameters, device, stream);
}

}  // namespace contextrast

extern "C" {

// A call with invalid arguments needs no scratch, so its size is 0.
int64_t contextrast_distance_scratch_cuda(const ContextrastVolume *volume, const ContextrastDistance *wanted,
                                          int edges) {
  char error[CONTEXTRAST_ERROR_SIZE];
  if (contextrast::check_volume("the map", *volume, edges != 0, error) ||
      contextrast::check_wanted(*wanted, edges != 0, error) || contextrast::is_empty(*volume))
    return 0;
  if (!contextrast::is_map(*volume, *wanted)) return contextrast::volume_scratch(*volume, *wanted, edges != 0);
  contextrast::Scratch scratch(nullptr);
  contextrast::OneMap(scratch, volume->batch, volume->size[1], volume->size[2]);
  return scratch.used();
}

int contextrast_edge_distance_cuda(const ContextrastVolume *classes, const ContextrastDistance *wanted, void *scratch,
                                   int device, void *stream, char *error) {
  return contextrast::transform("classes", *classes, false, *wanted, scratch, device, stream, error);
}

int contextrast_distance_transform_cuda(const ContextrastVolume *mask, const ContextrastDistance *wanted, void *scratch,
                                        int device, void *stream, char *error) {
  return contextrast::transform("mask", *mask, true, *wanted, scratch, device, stream, error);
}

int contextrast_cuda_status(int device, char *error) {
  const contextrast::OnDevice current(device);
  cudaError_t status = current.status();
  cudaFuncAttributes attributes;
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, contextrast::solve<int32_t>);
  return contextrast::answer(status, error);
}

}  // extern "C"
