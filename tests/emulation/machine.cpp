// The machine of cuda_runtime.h.
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace emulation {
namespace {

constexpr int LANES = 32, MOST_THREADS = 1024;
constexpr unsigned RESIDENT = 3;  // blocks at a time
constexpr size_t STACK = 256 << 10, USUAL_SHARED = 48 << 10, MOST_SHARED = 227 << 10;

uint64_t state = 1;
uint64_t draw() {  // splitmix64
  uint64_t z = state += 0x9E3779B97F4A7C15;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
  z = (z ^ z >> 27) * 0x94D049BB133111EB;
  return z ^ z >> 31;
}

int device = 0;
long long launches = 0;
std::string failure;
std::map<const void *, size_t> allowed;

void fail(const std::string &sentence) {
  if (failure.empty()) failure = "emulation: " + sentence;
}

}  // namespace

// Two turns: a lane may come to the next operation before the others have read this one, but not to the one after it.
struct Warp {
  uint64_t values[2][LANES];
  const char *operation[2];
  int arrived[2] = {0, 0};
};

struct Fiber;

struct Block {
  unsigned index, size;
  std::vector<Warp> warps;
  std::vector<Fiber *> fibers;
  std::unique_ptr<char[]> fixed, dynamic;
  size_t fixed_bytes = 0;
  const char *operation[2];
  unsigned arrived[2] = {0, 0}, left = 0;
  bool any[2];
};

// A thread, and the stack on which thread after thread runs.
struct Fiber : Thread {
  ucontext_t context;
  jmp_buf point;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool started = false, waits = false, done = true;
  unsigned warp_turn = 0, block_turn = 0;
};

Thread *current = nullptr;

namespace {

const std::function<void()> *body;
ucontext_t scheduler_context;
jmp_buf scheduler_point;
std::vector<Fiber *> runnable;

// AddressSanitizer follows swapcontext; without it a jump costs a thirtieth.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool JUMP = false;
#else
constexpr bool JUMP = true;
#endif

void to_scheduler() {
  Fiber *const fiber = static_cast<Fiber *>(current);
  if (!JUMP) {
    swapcontext(&fiber->context, &scheduler_context);
  } else if (!_setjmp(fiber->point)) {
    _longjmp(scheduler_point, 1);
  }
}

void threads() {
  for (;;) {
    (*body)();
    static_cast<Fiber *>(current)->done = true;
    to_scheduler();
  }
}

void resume(Fiber *fiber) {
  current = fiber;
  if (JUMP && _setjmp(scheduler_point)) return;
  if (fiber->started && JUMP) _longjmp(fiber->point, 1);
  if (!fiber->started) {
    fiber->started = true;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = STACK - draw() % 64 * 256;  // else all tops share a few lines of the cache
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, threads, 0);
  }
  swapcontext(&scheduler_context, &fiber->context);
}

void wait() {
  Fiber *const fiber = static_cast<Fiber *>(current);
  fiber->waits = true;
  to_scheduler();
}

void wake(Fiber *fiber) {
  if (fiber == current || !fiber->waits) return;
  fiber->waits = false;
  runnable.push_back(fiber);
}

std::unique_ptr<char[]> garbage(size_t bytes) {
  std::unique_ptr<char[]> memory(new char[bytes]);
  memset(memory.get(), 0xAB, bytes);
  return memory;
}

}  // namespace

const uint64_t *meet(const char *operation, uint64_t value) {
  Fiber *const fiber = static_cast<Fiber *>(current);
  Warp &warp = *fiber->warp;
  const unsigned turn = fiber->warp_turn++ & 1, lane = fiber->index % LANES;
  if (warp.arrived[turn] == 0) warp.operation[turn] = operation;
  if (strcmp(warp.operation[turn], operation) != 0)
    fail(std::string("lanes of a warp meet in ") + warp.operation[turn] + " and " + operation);
  warp.values[turn][lane] = value;
  if (++warp.arrived[turn] < LANES) {
    wait();
  } else {
    warp.arrived[turn] = 0;
    const unsigned first = fiber->index - lane;
    for (int i = 0; i < LANES; ++i) wake(fiber->block->fibers[first + i]);
  }
  return warp.values[turn];
}

bool block_meet(const char *operation, bool value) {
  Fiber *const fiber = static_cast<Fiber *>(current);
  Block &block = *fiber->block;
  const unsigned turn = fiber->block_turn++ & 1;
  if (block.arrived[turn] == 0) {
    block.operation[turn] = operation;
    block.any[turn] = false;
  }
  if (strcmp(block.operation[turn], operation) != 0)
    fail(std::string("threads of a block meet in ") + block.operation[turn] + " and " + operation);
  block.any[turn] |= value;
  if (++block.arrived[turn] < block.size) {
    wait();
  } else {
    block.arrived[turn] = 0;
    for (Fiber *other : block.fibers) wake(other);
  }
  return block.any[turn];
}

void pause() {
  if (draw() % 4) return;
  runnable.push_back(static_cast<Fiber *>(current));
  to_scheduler();
}

void check_mask(unsigned mask) {
  if (mask != ~0u) fail("a collective of fewer than 32 lanes is not emulated");
}

void *block_memory(size_t bytes) {
  Block &block = *current->block;
  if (!block.fixed) {
    block.fixed = garbage(bytes);
    block.fixed_bytes = bytes;
  }
  if (block.fixed_bytes != bytes) fail("a kernel has two kinds of fixed shared memory");
  return block.fixed.get();
}

void *dynamic_memory() { return current->block->dynamic.get(); }
unsigned block_index() { return current->block->index; }
unsigned block_size() { return current->block->size; }

cudaError_t allow_memory(const void *kernel, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > MOST_SHARED) return cudaErrorInvalidValue;
  allowed[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

cudaError_t run(const void *kernel, const cudaLaunchConfig_t &config, const std::function<void()> &thread) {
  static std::vector<std::unique_ptr<Fiber>> pool;
  const unsigned blocks = config.gridDim.x, size = config.blockDim.x;
  if (blocks == 0 || blocks > INT32_MAX || size == 0 || size > MOST_THREADS || size % LANES)
    return cudaErrorInvalidConfiguration;
  const auto found = allowed.find(kernel);
  if (config.dynamicSmemBytes > (found == allowed.end() ? USUAL_SHARED : found->second)) return cudaErrorInvalidValue;
  ++launches;
  failure.clear();
  body = &thread;

  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  for (unsigned i = blocks; i > 1; --i) std::swap(order[i - 1], order[draw() % i]);

  std::vector<Fiber *> idle;
  for (auto &fiber : pool) idle.push_back(fiber.get());
  runnable.clear();
  unsigned next = 0, resident = 0;
  std::vector<std::unique_ptr<Block>> live;
  while ((next < blocks || resident > 0) && failure.empty()) {
    while (resident < RESIDENT && next < blocks) {
      auto block = std::make_unique<Block>();
      block->index = order[next++];
      block->size = size;
      block->dynamic = garbage(config.dynamicSmemBytes);
      block->warps.resize(size / LANES);
      block->left = size;
      for (unsigned i = 0; i < size; ++i) {
        if (idle.empty()) {
          pool.push_back(std::make_unique<Fiber>());
          idle.push_back(pool.back().get());
        }
        Fiber *const fiber = idle.back();
        idle.pop_back();
        fiber->index = i;
        fiber->warp = &block->warps[i / LANES];
        fiber->block = block.get();
        fiber->waits = fiber->done = false;
        fiber->warp_turn = fiber->block_turn = 0;
        block->fibers.push_back(fiber);
        runnable.push_back(fiber);
      }
      live.push_back(std::move(block));
      ++resident;
    }
    if (runnable.empty()) {
      fail("threads wait for one that has returned or waits elsewhere");
      break;
    }
    // Mostly who was woken last, for the cache's sake.
    const size_t i = draw() % 8 ? runnable.size() - 1 : draw() % runnable.size();
    Fiber *const fiber = runnable[i];
    runnable[i] = runnable.back();
    runnable.pop_back();
    resume(fiber);
    current = nullptr;
    if (!fiber->done) continue;
    idle.push_back(fiber);
    Block *const block = fiber->block;
    if (--block->left) continue;
    --resident;
    for (size_t k = 0; k < live.size(); ++k)
      if (live[k].get() == block) {
        live.erase(live.begin() + static_cast<long>(k));
        break;
      }
  }
  if (failure.empty()) return cudaSuccess;
  for (auto &fiber : pool) fiber.release();  // their stacks hold abandoned threads
  pool.clear();
  return cudaErrorLaunchFailure;
}

}  // namespace emulation

cudaError_t cudaGetDevice(int *device) {
  *device = emulation::device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  emulation::device = device;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char *cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    default: return emulation::failure.c_str();
  }
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int) {
  *value = emulation::MOST_SHARED;
  return cudaSuccess;
}
// Also across what AddressSanitizer guards between the pieces of scratch.
__attribute__((no_sanitize_address)) cudaError_t cudaMemsetAsync(void *memory, int value, size_t bytes, cudaStream_t) {
  volatile char *const to = static_cast<char *>(memory);
  for (size_t i = 0; i < bytes; ++i) to[i] = static_cast<char>(value);
  return cudaSuccess;
}

extern "C" __attribute__((visibility("default"))) void emulation_seed(uint64_t seed) { emulation::state = seed; }
extern "C" __attribute__((visibility("default"))) long long emulation_launches() { return emulation::launches; }
