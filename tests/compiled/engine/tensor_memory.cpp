// Blackwell's tensor cores: tensor memory, tcgen05, and the mbarrier that tells when products are done.
//
// Tensor memory has 128 lanes of 512 columns of 32 bits; bits 16.. of an address are the lane, the others the column.
// A product with 64 rows has row r in lane 32 (r / 16) + r % 16, so that each warp of four holds 16. Products run at
// once here; what has to wait for them is checked by marks: a product belongs to the next commit, a warp has seen the
// commits whose mbarrier it has waited for, and may read only their results.
#include "tensor_cores.h"

constexpr int LANES = 128, COLUMNS = 512;

struct Cell {
  u32 value, epoch, commit;  // commit: of the product that wrote it
  u8 writer, undefined, storing;  // storing: not yet waited for by its warp
};

struct Barrier {
  u32 expected, missing, phase, commit;
  std::vector<std::pair<u32, u32>> reads;  // of shared memory by the products that it tells of
};

static struct {
  std::vector<Cell> cells;
  u32 allocated, commits;
  std::vector<std::pair<u32, u32>> reads;
  std::map<u64, Barrier> barriers;
} tensor;

void reset_tensor_memory() {
  tensor.cells.clear();
  tensor.allocated = tensor.commits = 0;
  tensor.reads.clear(), tensor.barriers.clear();
}

void check_tensor_memory_is_free(Machine& machine) {
  if (tensor.allocated) machine.report(TENSOR_BOUNDS, int(machine.program.size()) - 1, 0, 0, tensor.allocated);
}

static Cell* cell_at(const Context& c, int lane, u32 address) {
  const u32 row = address >> 16, column = address & 0xffff;
  if (row >= LANES || column >= tensor.allocated) {
    c.report(TENSOR_BOUNDS, lane, address);
    return nullptr;
  }
  return &tensor.cells[row * COLUMNS + column];
}

// True where it is undefined. Products follow each other in order: by_product.
static bool read_cell(const Context& c, int lane, u32 address, u32& value, bool by_product) {
  const Cell* cell = cell_at(c, lane, address);
  if (!cell) return true;
  if (cell->storing || (cell->commit > c.warp.commits_seen && !by_product)) c.report(TENSOR_ORDER, lane, address, cell->writer);
  if (cell->epoch == c.machine.epoch && cell->writer != c.warp.number) c.report(TENSOR_RACE, lane, address, cell->writer);
  value = cell->value;
  return cell->undefined;
}

// Operands: address in shared memory where the allocation is written. numbers[0]: columns.
void allocate(Context& c) {
  c.needs(ALL);
  u64 addresses[32];
  addresses_of(c, 0, addresses);
  if (tensor.cells.empty()) tensor.cells.assign(LANES * COLUMNS, Cell{0, 0, 0, 0, 1, 0});
  const u32 base = tensor.allocated;
  tensor.allocated += c.number(0);
  if (tensor.allocated > COLUMNS) c.report(TENSOR_BOUNDS, 0, tensor.allocated);
  if (u8* place = shared_at(c, 0, addresses[0], 4, 4)) {
    write_shared(c, 0, addresses[0], 4, reinterpret_cast<const u8*>(&base), false);
    memcpy(place, &base, 4);
  }
}

// numbers[0]: columns.
void release(Context& c) {
  c.needs(ALL);
  if (u32(c.number(0)) > tensor.allocated) c.report(TENSOR_BOUNDS, 0, c.number(0));
  tensor.allocated -= std::min<u32>(c.number(0), tensor.allocated);
}

// Shape 16x32bx2: threads 0-15 have the columns of the address, threads 16-31 those `numbers[1]` further on, both in
// lanes 0-15 of it. Operands of loads: registers, address; of stores: address, registers. numbers: registers, offset of
// the second half, -, -, offset, bytes of the address.
static u32 address_of_thread(const Context& c, const u64* addresses, int thread) {
  const u32 base = u32(addresses[thread]), lane = base >> 16;
  if (lane / 32 != u32(c.warp.number % 4)) c.report(TENSOR_BOUNDS, thread, base, c.warp.number);
  return base + (u32(thread % 16) << 16) + (thread < 16 ? 0 : c.number(1));
}

void load_tensor(Context& c) {
  c.needs(ALL);
  const int count = c.number(0);
  u64 addresses[32];
  addresses_of(c, count, addresses);
  for (int k = 0; k < count; k++) {
    u32 undefined = 0;
    for (int thread = 0; thread < 32; thread++) {
      u32 value = 0;
      undefined |= u32(read_cell(c, thread, address_of_thread(c, addresses, thread) + k, value, false)) << thread;
      c.reg<u32>(k)[thread] = value;
    }
    c.set_undefined(k, undefined);
  }
}

void store_tensor(Context& c) {
  c.needs(ALL);
  u64 addresses[32];
  addresses_of(c, 0, addresses);
  for (int k = 0; k < c.number(0); k++)
    for (int thread = 0; thread < 32; thread++) {
      const u32 address = address_of_thread(c, addresses, thread) + k;
      Cell* cell = cell_at(c, thread, address);
      if (!cell) continue;
      if (cell->commit > c.warp.commits_seen) c.report(TENSOR_ORDER, thread, address, cell->writer);
      if (cell->epoch == c.machine.epoch && cell->writer != c.warp.number) c.report(TENSOR_RACE, thread, address, cell->writer);
      const u8 undefined = c.undefined(1 + k) >> thread & 1;
      *cell = Cell{c.reg<u32>(1 + k)[thread], c.machine.epoch, 0, u8(c.warp.number), undefined, 1};
    }
}

void wait_for_stores(Context& c) {
  c.needs(ALL);
  for (Cell& cell : tensor.cells)
    if (cell.storing && cell.writer == c.warp.number) cell.storing = 0;
}

// One thread has the tensor core compute D (+)= A B. Operands: address of D, address or descriptor of A, descriptor of
// B, what is multiplied (instruction descriptor), accumulate. numbers: 16 bits (0) or TF32 (2), A is in tensor memory,
// offset of A, -, offset of D, bytes of the address.
void multiply_tensor(Context& c) {
  const int thread = c.first_lane();
  u64 addresses[32];
  addresses_of(c, 0, addresses);
  const u32 what = c.reg<u32>(3)[thread], D = u32(addresses[thread]);
  const Type type = c.number(0) == TFLOAT32 ? TFLOAT32 : what >> 7 & 7 ? BFLOAT16 : FLOAT16;
  const int M = int(what >> 24 & 31) * 16, N = int(what >> 17 & 63) * 8, K = type == TFLOAT32 ? 8 : 16;
  const u32 expected = type == TFLOAT32 ? 2u : u32(type == BFLOAT16);
  if (M != 64 || (what & 3 << 4) != 1 << 4 || (what >> 7 & 7) != expected || (what >> 10 & 7) != expected || (what & 3 << 13)) {
    c.report(DESCRIPTOR, thread, what);
    return;
  }
  for (int k = 1; k < 5; k++)
    if (c.undefined(k) >> thread & 1) c.report(UNDEFINED_ADDRESS, thread, 0);
  const bool accumulate = c.predicate(4) >> thread & 1;
  auto lane_of = [](int row) { return u32(32 * (row / 16) + row % 16) << 16; };
  static std::vector<float> A, B, C;
  static std::vector<u8> bad_row, bad_column, bad;
  A.assign(M * K, 0), B.assign(K * N, 0), C.assign(M * N, 0);
  bad_row.assign(M, 0), bad_column.assign(N, 0), bad.assign(M * N, 0);
  for (int row = 0; row < M; row++)
    for (int k = 0; k < K; k++) {
      bool undefined;
      if (c.number(1)) {
        const int elements = elements_of(type);
        u32 word = 0;
        const u32 address = c.reg<u32>(1)[thread] + c.number(2) + lane_of(row) + k / elements;
        undefined = read_cell(c, thread, address, word, true);
        A[row * K + k] = element(word, k % elements, type);
      } else {
        A[row * K + k] = element_in_shared(c, c.reg<u64>(1)[thread], row, k, type, what >> 15 & 1, tensor.reads, undefined);
      }
      bad_row[row] |= undefined;
    }
  for (int column = 0; column < N; column++)
    for (int k = 0; k < K; k++) {
      bool undefined;
      B[k * N + column] = element_in_shared(c, c.reg<u64>(2)[thread], column, k, type, what >> 16 & 1, tensor.reads, undefined);
      bad_column[column] |= undefined;
    }
  if (accumulate)
    for (int row = 0; row < M; row++)
      for (int column = 0; column < N; column++) {
        u32 word = 0;
        bad[row * N + column] = read_cell(c, thread, D + lane_of(row) + column, word, true);
        C[row * N + column] = as_float(word);
      }
  multiply_add(c.machine, A.data(), B.data(), C.data(), M, N, K, products_of_a_block(c.machine, type));
  for (int row = 0; row < M; row++)
    for (int column = 0; column < N; column++) {
      Cell* cell = cell_at(c, thread, D + lane_of(row) + column);
      if (!cell) continue;
      const u8 undefined = bad_row[row] | bad_column[column] | bad[row * N + column];
      *cell = Cell{bits_of(C[row * N + column]), 0, tensor.commits + 1, u8(c.warp.number), undefined, 0};
    }
}

// ------------------------------------------------------------------------------------------------------------ mbarrier
// Operands: [predicate,] address in shared memory[, number]. A phase is over when all that were expected have arrived.

static Barrier* barrier_at(const Context& c, u64 address) {
  const auto found = tensor.barriers.find(address);
  if (found != tensor.barriers.end()) return &found->second;
  c.report(DESCRIPTOR, c.first_lane(), address);
  return nullptr;
}

void init_barrier(Context& c) {  // numbers[0]: arrivals
  u64 addresses[32];
  addresses_of(c, 0, addresses);
  const int thread = c.first_lane();
  const u64 value = c.number(0);
  if (u8* place = shared_at(c, thread, addresses[thread], 8, 8)) {
    write_shared(c, thread, addresses[thread], 8, reinterpret_cast<const u8*>(&value), false);
    memcpy(place, &value, 8);
    tensor.barriers[addresses[thread]] = Barrier{u32(value), u32(value), 0, 0, {}};
  }
}

void drop_barrier(Context& c) {
  u64 addresses[32];
  addresses_of(c, 0, addresses);
  if (barrier_at(c, addresses[c.first_lane()])) tensor.barriers.erase(addresses[c.first_lane()]);
}

void commit_products(Context& c) {
  u64 addresses[32];
  addresses_of(c, 0, addresses);
  Barrier* barrier = barrier_at(c, addresses[c.first_lane()]);
  if (!barrier) return;
  barrier->commit = ++tensor.commits;
  barrier->reads = tensor.reads;
  tensor.reads.clear();
  if (--barrier->missing == 0) barrier->phase++, barrier->missing = barrier->expected;
}

// Operands: predicate, address, parity.
void try_wait(Context& c) {
  u64 addresses[32];
  addresses_of(c, 1, addresses);
  const int thread = c.first_lane();
  Barrier* barrier = barrier_at(c, addresses[thread]);
  const bool done = barrier && (barrier->phase & 1) != (c.reg<u32>(2)[thread] & 1);
  if (done) {
    c.warp.commits_seen = std::max(c.warp.commits_seen, barrier->commit);
    for (const auto& [address, bytes] : barrier->reads) read_shared(c, -1, address, bytes);  // until now
  }
  c.write_predicate(0, done ? ALL : 0);
  c.set_undefined(0, c.undefined(2));
  c.warp.paused = !done;
}

// One lane of the warp. Operands: its number, predicate, mask.
void elect(Context& c) {
  c.needs(c.reg<u32>(2)[c.first_lane()]);
  u32 results[32];
  std::fill(results, results + 32, u32(c.first_lane()));
  if (!c.sink(0)) c.write(0, results);
  c.set_undefined(0, 0);
  c.write_predicate(1, 1u << c.first_lane());
  c.set_undefined(1, 0);
}

void define_tensor_memory() {
  define("tcgen05.alloc", allocate), define("tcgen05.dealloc", release);
  define("tcgen05.ld", load_tensor), define("tcgen05.st", store_tensor), define("tcgen05.wait::st", wait_for_stores);
  define("tcgen05.mma", multiply_tensor), define("tcgen05.commit", commit_products);
  define("mbarrier.init", init_barrier), define("mbarrier.inval", drop_barrier), define("mbarrier.try_wait", try_wait);
  define("elect", elect);
}
