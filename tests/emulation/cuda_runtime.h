// As much of CUDA as csrc/*.cu use, on a CPU: the kernels and their launches compile unchanged as C++, every thread of
// a block is a fiber, and a warp's lanes meet in its collectives. Threads and blocks run in an order drawn by a seed,
// some blocks at a time, and change at collectives, barriers and atomics. Shared memory has its exact size and begins
// as garbage. What a GPU would leave undefined fails the launch with a sentence: lanes that meet in different
// operations, that wait for one that has returned, a block that asks for more shared memory than it may have.
#ifndef CONTEXTRAST_EMULATION_H
#define CONTEXTRAST_EMULATION_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- The machine

namespace emulation {

struct Warp;
struct Block;

struct Thread {
  unsigned index;
  Warp *warp;
  Block *block;
};

extern Thread *current;

// What the 32 lanes of the warp bring to an operation, once all have come. Lanes must come to the same one.
const uint64_t *meet(const char *operation, uint64_t value);
// All threads of the block; whether any brought true.
bool block_meet(const char *operation, bool value);
// Others may run between.
void pause();
void *block_memory(size_t bytes);  // fixed
void *dynamic_memory();
unsigned block_index();
unsigned block_size();

inline unsigned lane() { return current->index % 32; }

template <class T>
uint64_t bits_of(T value) {
  static_assert(sizeof(T) <= 8, "a value of a lane");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T value_of(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

void check_mask(unsigned mask);

}  // namespace emulation

[[maybe_unused]] inline struct {
  struct {
    operator unsigned() const { return emulation::current->index; }
  } x;
} threadIdx;
[[maybe_unused]] inline struct {
  struct {
    operator unsigned() const { return emulation::block_index(); }
  } x;
} blockIdx;
[[maybe_unused]] inline struct {
  struct {
    operator unsigned() const { return emulation::block_size(); }
  } x;
} blockDim;

namespace contextrast {
template <class T>
T &block_shared() {
  return *static_cast<T *>(::emulation::block_memory(sizeof(T)));
}
template <class T>
T *dynamic_shared() {
  return static_cast<T *>(::emulation::dynamic_memory());
}
}  // namespace contextrast

// ---- Warps and blocks

inline void __syncthreads() { emulation::block_meet("__syncthreads", false); }
inline int __syncthreads_or(int value) { return emulation::block_meet("__syncthreads_or", value != 0); }

inline void __syncwarp() { emulation::meet("__syncwarp", 0); }

inline unsigned __ballot_sync(unsigned mask, int value) {
  emulation::check_mask(mask);
  const uint64_t *const all = emulation::meet("__ballot_sync", value != 0);
  unsigned ballot = 0;
  for (int i = 0; i < 32; ++i) ballot |= static_cast<unsigned>(all[i]) << i;
  return ballot;
}
inline int __any_sync(unsigned mask, int value) { return __ballot_sync(mask, value) != 0; }
inline int __all_sync(unsigned mask, int value) { return __ballot_sync(mask, value) == ~0u; }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  emulation::check_mask(mask);
  return emulation::value_of<T>(emulation::meet("__shfl_sync", emulation::bits_of(value))[lane & 31]);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  emulation::check_mask(mask);
  const uint64_t *const all = emulation::meet("__shfl_up_sync", emulation::bits_of(value));
  return emulation::value_of<T>(all[emulation::lane() >= delta ? emulation::lane() - delta : emulation::lane()]);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  emulation::check_mask(mask);
  const uint64_t *const all = emulation::meet("__shfl_down_sync", emulation::bits_of(value));
  return emulation::value_of<T>(all[emulation::lane() + delta < 32 ? emulation::lane() + delta : emulation::lane()]);
}

template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  static_assert(sizeof(T) == 4 && std::is_integral_v<T>, "as on the device");
  emulation::check_mask(mask);
  const uint64_t *const all = emulation::meet("__reduce_min_sync", emulation::bits_of(value));
  for (int i = 0; i < 32; ++i)
    if (emulation::value_of<T>(all[i]) < value) value = emulation::value_of<T>(all[i]);
  return value;
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  static_assert(sizeof(T) == 4 && std::is_integral_v<T>, "as on the device");
  emulation::check_mask(mask);
  const uint64_t *const all = emulation::meet("__reduce_max_sync", emulation::bits_of(value));
  for (int i = 0; i < 32; ++i)
    if (value < emulation::value_of<T>(all[i])) value = emulation::value_of<T>(all[i]);
  return value;
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "as on the device");
  emulation::check_mask(mask);
  const uint64_t *const all = emulation::meet("__match_any_sync", emulation::bits_of(value));
  unsigned same = 0;
  for (int i = 0; i < 32; ++i) same |= static_cast<unsigned>(all[i] == emulation::bits_of(value)) << i;
  return same;
}

// ---- Memory

inline void __threadfence() {}
template <class T>
T __ldg(const T *from) {
  return *from;
}
template <class T>
T __ldcg(const T *from) {
  return *from;
}
template <class T>
T atomicAdd(T *to, T value) {
  emulation::pause();
  const T old = *to;
  *to = old + value;
  return old;
}
template <class T>
T atomicMin(T *to, T value) {
  emulation::pause();
  const T old = *to;
  if (value < old) *to = value;
  return old;
}
inline unsigned long long atomicCAS(unsigned long long *to, unsigned long long expected, unsigned long long value) {
  emulation::pause();
  const unsigned long long old = *to;
  if (old == expected) *to = value;
  return old;
}

// ---- Arithmetic

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clzll(long long bits) { return bits ? __builtin_clzll(static_cast<unsigned long long>(bits)) : 64; }

// ---- Runtime

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidConfiguration,
  cudaErrorInvalidDevice,
  cudaErrorLaunchFailure
};
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
typedef struct emulated_stream *cudaStream_t;
struct cudaFuncAttributes {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace emulation {
cudaError_t run(const void *kernel, const cudaLaunchConfig_t &config, const std::function<void()> &thread);
cudaError_t allow_memory(const void *kernel, int bytes);
}  // namespace emulation

cudaError_t cudaGetDevice(int *device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetLastError();
const char *cudaGetErrorString(cudaError_t status);
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void *memory, int value, size_t bytes, cudaStream_t stream);

template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *, void (*)(Parameters...)) {
  return cudaSuccess;
}
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  return emulation::allow_memory(reinterpret_cast<const void *>(kernel), value);
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Parameters...),
                               const Arguments &...arguments) {
  return emulation::run(reinterpret_cast<const void *>(kernel), *config, [&] { kernel(arguments...); });
}

#endif
