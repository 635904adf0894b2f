// Kernels that are wrong, for the machine to find out.
#include <cuda_runtime.h>

namespace {

enum Fault { NONE, DIFFERENT_OPERATIONS, MISSING_LANE, MISSING_THREAD, TOO_MUCH_MEMORY, BROKEN_WARP };

__global__ void kernel(int fault) {
  const int lane = threadIdx.x % 32;
  if (fault == DIFFERENT_OPERATIONS) {
    if (lane == 7)
      __ballot_sync(~0u, 1);
    else
      __shfl_sync(~0u, lane, 0);
  }
  if (fault == MISSING_LANE && lane == 3) return;
  __syncwarp();
  if (fault == MISSING_THREAD && threadIdx.x == 40) return;
  __syncthreads();
}

struct Shared {
  int values[64];
};

// Every thread adds up what all threads have written.
__global__ void sum(bool barrier, int *sums) {
  auto &shared = contextrast::block_shared<Shared>();
  shared.values[threadIdx.x] = 1;
  if (barrier) __syncthreads();
  int total = 0;
  for (int i = 0; i < 64; ++i) total += shared.values[i];
  sums[threadIdx.x] = total;
}

cudaError_t launch(int fault) {
  cudaLaunchConfig_t config;
  config.gridDim = dim3(2);
  config.blockDim = dim3(fault == BROKEN_WARP ? 40 : 64);
  config.dynamicSmemBytes = fault == TOO_MUCH_MEMORY ? 50 << 10 : 0;
  return cudaLaunchKernelEx(&config, kernel, fault);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char *fault(int which) {
  return cudaGetErrorString(launch(which));
}

extern "C" __attribute__((visibility("default"))) int wrong_sums(int barrier) {
  int sums[64], wrong = 0;
  cudaLaunchConfig_t config;
  config.gridDim = dim3(1);
  config.blockDim = dim3(64);
  if (cudaLaunchKernelEx(&config, sum, barrier != 0, &sums[0]) != cudaSuccess) return -1;
  for (int i = 0; i < 64; ++i) wrong += sums[i] != 64;
  return wrong;
}
