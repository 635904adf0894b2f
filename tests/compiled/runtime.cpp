// As much of the CUDA runtime as csrc/*.cu call, without a GPU: it is linked with them in the place of cudart, checks a
// launch as CUDA does, and hands launches and memsets to the functions that csrc.py sets. AddressSanitizer's two
// functions, which csrc/host.h calls where it is built for it, tell which bytes lie between the pieces of scratch.
#include <cuda_runtime_api.h>
#include <string.h>

#include <map>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Kernel {
  std::string name;
  size_t dynamic_limit = 48 << 10;  // bytes of dynamic shared memory that a launch may ask for
};

using Launch = int (*)(const char *kernel, const unsigned *grid, const unsigned *block, size_t dynamic, void **arguments);
using Memset = int (*)(void *memory, int value, size_t bytes);

std::map<const void *, Kernel> &kernels() {  // filled by constructors of the other files
  static std::map<const void *, Kernel> all;
  return all;
}
Launch on_launch;
Memset on_memset;
std::vector<std::pair<const char *, const char *>> gaps;  // first byte, end
int shared_of_block, device;                              // the most that a block may have
cudaError_t last_error = cudaSuccess;

cudaError_t answer(cudaError_t status) {
  if (status != cudaSuccess) last_error = status;
  return status;
}

}  // namespace

// ---- For csrc.py

EXPORT void runtime_set(Launch launch, Memset memset, int most_shared) {
  on_launch = launch;
  on_memset = memset;
  shared_of_block = most_shared;
}
// Copies the gaps that lie in from..end, at most `most`, and forgets all. Returns their number.
EXPORT int runtime_gaps(const char *from, const char *end, const char **pairs, int most) {
  int count = 0;
  for (const auto &gap : gaps)
    if (from <= gap.first && gap.second <= end && count++ < most) {
      pairs[2 * count - 2] = gap.first;
      pairs[2 * count - 1] = gap.second;
    }
  return count;
}

// ---- AddressSanitizer

EXPORT void __asan_poison_memory_region(const volatile void *memory, size_t bytes) {
  const char *const first = const_cast<const char *>(static_cast<const volatile char *>(memory));
  gaps.push_back({first, first + bytes});
}
EXPORT void __asan_unpoison_memory_region(const volatile void *, size_t) { gaps.clear(); }

// ---- What nvcc's own code calls

extern "C" {

void **__cudaRegisterFatBinary(void *) {
  static void *handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterFunction(void **, const char *host, char *, const char *name, int, uint3 *, uint3 *, dim3 *, dim3 *,
                            int *) {
  kernels()[host].name = name;
}

// Launches with <<< >>> come this way; csrc has none.
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, struct CUstream_st *) { return 1; }
cudaError_t __cudaPopCallConfiguration(dim3 *, dim3 *, size_t *, void *) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(cudaKernel_t *, const void *) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void **, size_t, cudaStream_t) {
  return answer(cudaErrorNotSupported);
}

// ---- The runtime

cudaError_t cudaGetDevice(int *current) {
  *current = device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int wanted) { return answer(wanted == 0 ? cudaSuccess : cudaErrorInvalidDevice); }
cudaError_t cudaGetLastError() {
  const cudaError_t status = last_error;
  last_error = cudaSuccess;
  return status;
}
const char *cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    default: return "an error that the machine does not know";
  }
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) return answer(cudaErrorInvalidValue);
  *value = shared_of_block;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *function) {
  memset(attributes, 0, sizeof *attributes);
  return answer(kernels().count(function) ? cudaSuccess : cudaErrorInvalidDeviceFunction);
}
cudaError_t cudaFuncSetAttribute(const void *function, cudaFuncAttribute attribute, int value) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return answer(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > shared_of_block)
    return answer(cudaErrorInvalidValue);
  found->second.dynamic_limit = static_cast<size_t>(value);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *memory, int value, size_t bytes, cudaStream_t) {
  return answer(on_memset(memory, value, bytes) ? cudaErrorLaunchFailure : cudaSuccess);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return answer(cudaErrorInvalidDeviceFunction);
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  const unsigned long long threads = 1ull * block.x * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 ||
      threads == 0 || threads > 1024 || block.z > 64)
    return answer(cudaErrorInvalidConfiguration);
  if (config->dynamicSmemBytes > found->second.dynamic_limit || config->numAttrs) return answer(cudaErrorInvalidValue);
  const unsigned grid_sides[3] = {grid.x, grid.y, grid.z}, block_sides[3] = {block.x, block.y, block.z};
  const int failed = on_launch(found->second.name.c_str(), grid_sides, block_sides, config->dynamicSmemBytes, arguments);
  return answer(failed ? cudaErrorLaunchFailure : cudaSuccess);
}

}  // extern "C"
