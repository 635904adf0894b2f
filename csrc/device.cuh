// Code that the kernels share: warps and blocks, several layers in one launch, and launching.
#ifndef CONTEXTRAST_DEVICE_CUH
#define CONTEXTRAST_DEVICE_CUH

#include <cuda_runtime.h>

#include "host.h"

namespace contextrast {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xFFFFFFFFu;
constexpr int BLOCK = 256;  // threads, where a kernel has no reason for another number

// A block's shared memory: one object of a fixed size, or as much as the launch asks for.
template <class T>
__device__ __forceinline__ T &block_shared() {
  __shared__ T shared;
  return shared;
}

template <class T>
__device__ __forceinline__ T *dynamic_shared() {
  extern __shared__ int4 shared[];
  return reinterpret_cast<T *>(shared);
}

// ---- Several layers in one launch: layer i has the blocks first[i]..first[i + 1] - 1.

struct BlockOfLayer {
  int layer, block;  // the block's number inside its layer
};

struct LayerBlocks {
  int32_t layers = 0;
  int64_t first[CONTEXTRAST_MAX_LAYERS + 1] = {};

  void add(int64_t blocks) {
    first[layers + 1] = first[layers] + blocks;
    ++layers;
  }
  int64_t total() const { return first[layers]; }

  __device__ BlockOfLayer find(unsigned block) const {
    int layer = 0;
    while (block >= first[layer + 1]) ++layer;
    return {layer, static_cast<int>(block - first[layer])};
  }
};

// ---- Order between blocks: the last one sees everything that the others wrote before.

// True in the warp that is the last of `total` to call it with this ticket, which was 0 before the launch.
__device__ __forceinline__ bool is_last_warp(uint32_t *ticket, uint32_t total) {
  __threadfence();
  __syncwarp();
  bool last = false;
  if (threadIdx.x % WARP == 0) last = atomicAdd(ticket, 1u) == total - 1;
  last = __any_sync(ALL_LANES, last);
  if (last) __threadfence();
  return last;
}

// The same for blocks.
__device__ __forceinline__ bool is_last_block(uint32_t *ticket, uint32_t total) {
  __threadfence();
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) == total - 1;
  last = __syncthreads_or(last);
  if (last) __threadfence();
  return last;
}

// ---- Host side

// Makes a device the current one until the end of the scope.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    status_ = cudaGetDevice(&previous_);
    if (status_ == cudaSuccess && previous_ != device_) status_ = cudaSetDevice(device_);
  }
  ~OnDevice() {
    if (status_ == cudaSuccess && previous_ != device_) cudaSetDevice(previous_);
  }
  OnDevice(const OnDevice &) = delete;
  OnDevice &operator=(const OnDevice &) = delete;
  cudaError_t status() const { return status_; }

 private:
  int device_, previous_ = -1;
  cudaError_t status_;
};

// Converts a CUDA status to a return code and a message.
inline int answer(cudaError_t status, char *error) {
  if (status == cudaSuccess) return CONTEXTRAST_OK;
  cudaGetLastError();  // clears it: it is reported here, and the next call must not find it again
  snprintf(error, CONTEXTRAST_ERROR_SIZE, "CUDA: %s", cudaGetErrorString(status));
  return CONTEXTRAST_DEVICE_FAILED;
}

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, cudaStream_t stream,
                   const Parameters &...parameters) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, parameters...);
}

}  // namespace contextrast
#endif
