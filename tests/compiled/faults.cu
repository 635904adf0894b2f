// Kernels that are wrong, each in one way, for the machine to find. fault(which, ...) runs one; 0 is right.
#include "device.cuh"

using namespace contextrast;

namespace {

enum Fault {
  NONE,
  DIFFERENT_OPERATIONS,
  LANE_HAS_ENDED,
  WARP_HAS_ENDED,
  BARRIER_IN_BRANCH,
  NO_BARRIER,
  NO_WARP_BARRIER,
  BEYOND_SHARED,
  BEYOND_DYNAMIC_SHARED,
  UNWRITTEN_SHARED,
  BEYOND_GLOBAL,
  UNWRITTEN_GLOBAL,
  UNWRITTEN_INDEX,
  UNWRITTEN_SUM,
  MISALIGNED,
  LANES_DISAGREE,
  CACHED_AS_READ_ONLY,
  DIVISION_BY_ZERO,
  ENDLESS,
  PLAIN_SUM,
  NO_FENCE_BEFORE,
  NO_FENCE_AFTER,
  TICKET_TOO_EARLY,
  NO_TICKET,
  BETWEEN_PIECES,
  TOO_MUCH_SHARED,
};

struct Shared {
  int values[64];
};

// A block of 64 threads turns its values round, by way of shared memory and of shuffles.
__global__ void inside_a_block(int fault, const int *in, int *out) {
  Shared &shared = block_shared<Shared>();
  int *const dynamic = dynamic_shared<int>();
  const int thread = threadIdx.x, lane = thread % WARP, other = 63 - thread;
  if (fault == LANE_HAS_ENDED && lane == 3) return;
  if (fault == WARP_HAS_ENDED && thread >= WARP) return;
  if (fault == ENDLESS)
    while (*static_cast<volatile const int *>(in) >= 0);
  int value = in[fault == BEYOND_GLOBAL ? thread + 1 : thread];
  if (fault == DIVISION_BY_ZERO) value /= in[0];
  const int place = fault == BEYOND_SHARED && thread == 63 ? -1 : thread;
  if (fault != UNWRITTEN_SHARED || thread != 5) shared.values[place] = value;
  dynamic[fault == BEYOND_DYNAMIC_SHARED && thread == 63 ? 128 : thread] = value;
  if (fault == DIFFERENT_OPERATIONS) {
    if (lane == 7)
      value += __ballot_sync(ALL_LANES, value);
    else
      value += __shfl_sync(ALL_LANES, value, 7);
  }
  if (fault == NO_BARRIER) {
  } else if (fault == BARRIER_IN_BRANCH) {
    if (value & 1) __syncthreads();
  } else {
    __syncthreads();
  }
  value = shared.values[other] + dynamic[other] + __shfl_sync(ALL_LANES, value, 3);
  dynamic[64 + thread] = value;
  if (fault != NO_WARP_BARRIER) __syncwarp();
  value += dynamic[64 + thread / WARP * WARP + (lane + 1) % WARP];
  while (fault == UNWRITTEN_GLOBAL && static_cast<volatile int *>(out)[thread] > 0);
  if (fault == UNWRITTEN_INDEX) value += in[out[thread] & 63];
  if (fault == UNWRITTEN_SUM) atomicAdd(out, value);
  if (fault == MISALIGNED) *reinterpret_cast<int2 *>(out + 1) = int2{value, value};
  out[thread] = value;
  if (fault == LANES_DISAGREE) out[0] = value;
  if (fault == CACHED_AS_READ_ONLY) out[thread] = __ldg(static_cast<const int *>(out) + thread) + 1;
}

// Each block writes a value; the last one adds them up.
__global__ void between_blocks(int fault, const int *in, int *out, int *values, uint32_t *ticket) {
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  if (threadIdx.x == 0) {
    values[block] = in[block];
    if (fault == PLAIN_SUM) ++ticket[1];
    if (fault == BETWEEN_PIECES && block == 1) values[blocks] = 1;
  }
  if (fault != NO_FENCE_BEFORE) __threadfence();
  __syncthreads();
  int last = 0;
  if (threadIdx.x == 0) last = static_cast<int>(atomicAdd(ticket, 1u)) == blocks - (fault == TICKET_TOO_EARLY ? 2 : 1);
  if (fault == NO_TICKET) last = block == 0;
  last = __syncthreads_or(last);
  if (!last) return;
  if (fault != NO_FENCE_AFTER) __threadfence();
  int sum = 0;
  for (int i = 0; i < blocks; ++i) sum += __ldcg(values + i);
  if (threadIdx.x == 0) *out = sum;
}

}  // namespace

// in, out: 64 numbers; scratch: 1024 bytes.
extern "C" __attribute__((visibility("default"))) const char *fault(int which, const int *in, int *out, void *scratch) {
  Scratch pieces(scratch);
  int *const values = pieces.take<int>(5);
  uint32_t *const ticket = pieces.take<uint32_t>(2);
  cudaError_t status = cudaMemsetAsync(ticket, 0, 2 * sizeof *ticket, nullptr);
  const bool between = PLAIN_SUM <= which && which <= BETWEEN_PIECES;
  const size_t shared = which == TOO_MUCH_SHARED ? 50 << 10 : 128 * sizeof(int);
  if (status == cudaSuccess && !between)
    status = launch(inside_a_block, 1, 2 * WARP, shared, nullptr, which, in, out);
  if (status == cudaSuccess && (between || which == NONE))
    status = launch(between_blocks, 5, 2 * WARP, 0, nullptr, which, in, out, values, ticket);
  return cudaGetErrorString(status);
}
