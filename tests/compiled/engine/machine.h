// The state of a launch: its program, the warps of the block that runs, shared memory, the extents of global memory
// with what is known of every byte, and the findings. run.cpp schedules; the other files define the instructions.
#pragma once
#include <algorithm>
#include <list>
#include <map>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "numbers.h"

constexpr u32 ALL = 0xffffffffu;  // all 32 lanes

// ------------------------------------------------------------------------------- what the caller fills in by engine.py

struct Operand {
  s32 place;  // of the register in a warp's file: 32 lanes side by side, or one word of 32 bits for a predicate; -1: a sink
  s32 word;   // of its undefined bits, one a lane
  s32 high;   // the same of the upper half of 32 or 64 bits; else the same word
};

struct Instruction {
  s32 handler;  // its number, or one of Control
  s32 guard, guard_word, guard_negated;  // the predicate's place, -1 for none
  s32 first, count;  // operands
  s32 numbers[8];  // what the handler's comment says
};

struct Constant {
  s32 place, word, high, width;
  u64 value;
};

struct Special {
  s32 place, word, which, unused;
};

struct Extent {  // a stretch of global memory that the kernel may touch
  u64 begin, end;
  u8* undefined;  // a mark for each byte that nobody has written; null where all are defined
  u64 grain;  // races are watched in pieces of so many bytes
};

struct Launch {
  s32 grid[3], block[3];
  s32 arch;  // 80, 90, ...
  s32 register_bytes, register_words;  // of one warp
  s32 shared_base, shared_bytes;
  s32 parameter_bytes;
  s32 instructions, operands, constants, specials, extents, blocks;
  s32 quantum;  // a warp runs up to so many instructions before another one may; 0: until a barrier
  s32 exact_sums;  // tensor cores add in float64 and round once, instead of as measured
  s32 noise;  // approximate instructions are as far off as PTX allows
  s32 count_memory;  // count sectors, wavefronts and caches too
  s32 l1_sectors;  // a block's share of the L1 cache
  u64 seed;  // of the orders; 0: blocks and warps in order
  u64 limit;  // instructions of warps, after which the launch is given up
};

struct Finding {
  s32 kind, instruction, block, warp, lane, other;
  u64 address, count;
};

struct Count {  // of one instruction
  u64 warps, lanes, sectors;
  u64 wavefronts, ideal;  // of shared memory: with bank conflicts and without
  u64 distinct, beyond_l1, beyond_l2;
};

enum Control { BRANCH = -1, RETURN = -2, BARRIER = -3, TRAP = -4 };

// The order is that of checks.KINDS.
enum Kind {
  GLOBAL_BOUNDS, GLOBAL_ALIGNMENT, SHARED_BOUNDS, SHARED_ALIGNMENT, PARAMETER_BOUNDS,
  UNDEFINED_STORE, UNDEFINED_ADDRESS, UNDEFINED_BRANCH, UNDEFINED_READ, UNDEFINED_ATOMIC,
  SHARED_RACE, BLOCK_RACE, GRID_RACE, WARP_RACE, LANES_DISAGREE, SAME_VALUE_SHARED, SAME_VALUE_GLOBAL,
  DIVERGED, BARRIER_MISMATCH, NO_PROXY_FENCE, DESCRIPTOR, DIVISION_BY_ZERO, TRAPPED, READ_ONLY_CACHE,
  TENSOR_BOUNDS, TENSOR_ORDER, TENSOR_RACE,
};

// ----------------------------------------------------------------------------------------------- what is known of memory

// Epochs count barriers: accesses of one epoch and of different warps have no order.
struct SharedByte {
  u32 write_epoch, read_epoch, fences, turn, readers;
  u8 writer, writer_lane, atomic, undefined;
  u64 step;
};

struct GlobalGrain {
  u32 write_block, read_block, write_epoch, read_epoch, step, readers;  // blocks + 1; 0: none; read_block ALL: several
  u32 write_fences, read_fences;  // that the writing lane and the last reading one had made
  u8 writer, atomic;
};

// -------------------------------------------------------------------------------------------------------------- warps

struct Path {  // lanes that wait at `pc`, and go on to wait at `join` for the others of their branch
  s32 pc;
  u32 mask;
  s32 join;
};

// See order.cpp.
struct Release {
  u32 block;
  std::vector<u32> fences;  // of each warp of the block
};
struct Sight {  // the first so many releases at an address
  u64 address;
  size_t releases;
};

struct Copy {  // by cp.async, not yet waited for
  u32 address, bytes;
  u8 lane, undefined;
  u32 fences;  // that the warp had made
  u8 value[16];
};

struct Pending {  // a result of wgmma: the words of its undefined bits, and the bits that wait_group gives it
  s32 word, high;
  u32 undefined;
};

struct Warp {
  int number;
  u8* registers;
  u32* undefined;
  u32 live, mask;
  int pc, join, barrier_pc;
  bool at_barrier, done;
  bool paused;  // waits for another warp in a loop
  u32 commits_seen;  // of Blackwell's products
  std::vector<Path> paths;
  u32 fences;  // of the async proxy, so far
  u32 turn;  // counts __syncwarp
  u32 fences_of_lane[32];  // of the whole device
  std::vector<u32> fences_of_block;  // at the last barrier
  std::vector<Sight> acquired, seen;  // by atomics since the last fence; before it
  // Results of wgmma that may not be read before wait_group, and the shared memory that is still being read.
  std::vector<Pending> pending;
  std::vector<std::pair<u32, u32>> async_reads;
  std::vector<std::vector<Copy>> copies;  // by group; the last is not committed
};

// See caches.cpp.
struct L1 {
  size_t capacity;  // sectors
  std::list<u64> order;  // the one used last is first
  std::unordered_map<u64, std::list<u64>::iterator> places;
  bool holds(u64 sector);  // and does from now on
  void clear();
};

struct Machine {
  Launch launch;
  std::vector<Instruction> program;
  std::vector<Operand> operands;
  std::vector<Extent> extents;
  std::vector<GlobalGrain*> grains;
  std::vector<u8> parameters, shared;
  std::vector<SharedByte> shared_bytes;
  std::vector<Warp> warps;
  std::vector<Count> counts;
  L1 l1;
  std::unordered_set<u64> sectors_read, sectors_written;  // by this launch
  std::map<std::pair<int, int>, Finding> findings;
  std::unordered_map<u64, std::vector<Release>> releases;  // by the atomics at each address
  bool barrier_or;  // of what warps bring to bar.red.or
  u32 epoch, block, block_at[3];
  u64 random_state, steps;

  void report(Kind kind, int pc, int warp, int lane, u64 address, int other = -1) {
    Finding& finding = findings[{kind, pc}];
    if (!finding.count) finding = Finding{kind, pc, s32(block), warp, lane, other, address, 0};
    finding.count++;
  }
  u64 random() {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return random_state;
  }
};

// ------------------------------------------------------------------------------------------- how an instruction is defined

// One instruction about to be executed by the lanes of `mask`.
struct Context {
  Machine& machine;
  Warp& warp;
  const Instruction& instruction;
  u32 mask;

  int number(int k) const { return instruction.numbers[k]; }
  const Operand& operand(int k) const { return machine.operands[instruction.first + k]; }
  bool sink(int k) const { return operand(k).place < 0; }
  bool active(int lane) const { return mask >> lane & 1; }
  int first_lane() const { return __builtin_ctz(mask); }

  template <class T>
  T* reg(int k) const { return reinterpret_cast<T*>(warp.registers + operand(k).place); }
  u32& predicate(int k) const { return *reg<u32>(k); }
  u64 read(int k, int lane, int width) const {
    return width == 2 ? reg<u16>(k)[lane] : width == 4 ? reg<u32>(k)[lane] : reg<u64>(k)[lane];
  }
  void write(int k, int lane, int width, u64 value) const {
    if (sink(k)) return;
    if (width == 2) reg<u16>(k)[lane] = u16(value);
    else if (width == 4) reg<u32>(k)[lane] = u32(value);
    else reg<u64>(k)[lane] = value;
  }
  template <class T>
  void write(int k, const T* values) const {
    T* target = reg<T>(k);
    if (mask == ALL) memcpy(target, values, 32 * sizeof(T));
    else
      for (int lane = 0; lane < 32; lane++) target[lane] = active(lane) ? values[lane] : target[lane];
  }
  void write_predicate(int k, u32 value) const { predicate(k) = (predicate(k) & ~mask) | (value & mask); }

  u32 undefined(int k) const { return warp.undefined[operand(k).word] | warp.undefined[operand(k).high]; }
  u32 undefined_low(int k) const { return warp.undefined[operand(k).word]; }
  u32 undefined_high(int k) const { return warp.undefined[operand(k).high]; }
  u32 undefined_guard() const { return instruction.guard >= 0 ? warp.undefined[instruction.guard_word] : 0; }
  void set_undefined(int k, u32 lanes) const { set_undefined(k, lanes, lanes); }
  void set_undefined(int k, u32 low, u32 high) const {  // of the halves of a register of 32 or 64 bits
    if (sink(k)) return;
    const u32 guard = undefined_guard();
    u32 &first = warp.undefined[operand(k).word], &second = warp.undefined[operand(k).high];
    second = (second & ~mask) | (mask & (high | guard));
    first = (first & ~mask) | (mask & (low | guard));
  }

  void report(Kind kind, int lane, u64 address, int other = -1) const {
    machine.report(kind, warp.pc, warp.number, lane, address, other);
  }
  // The instruction needs all live lanes of `wanted` at once.
  void needs(u32 wanted) const {
    const u32 missing = warp.live & wanted & ~mask;
    if (missing) report(DIVERGED, __builtin_ctz(missing), mask);
  }
};

using Handler = void (*)(Context&);

// Enters an instruction into the table that lowering.py's names are looked up in. operands: how many it has; -1: the
// handler and its function in lowering.py agree on that.
void define(const std::string& name, Handler handler, int operands = -1);

// An instruction that computes each lane of its first operand from the same lane of the others:
//   elementwise<u32, u32, u32>("add.u32", [](u32 x, u32 y) { return x + y; });
template <class Function, class Result, class... Arguments, size_t... k>
void apply_elementwise(Context& c, std::index_sequence<k...>) {
  Result results[32];
  for (int lane = 0; lane < 32; lane++) results[lane] = Function()(c.reg<Arguments>(1 + k)[lane]...);
  c.write(0, results);
  c.set_undefined(0, (c.undefined(1 + k) | ...));
}
// The same for each half of registers of 32 or 64 bits.
template <class T, class Function, size_t... k>
void apply_halfwise(Context& c, std::index_sequence<k...>) {
  T results[32];
  for (int lane = 0; lane < 32; lane++) results[lane] = Function()(c.reg<T>(1 + k)[lane]...);
  c.write(0, results);
  c.set_undefined(0, (c.undefined_low(1 + k) | ...), (c.undefined_high(1 + k) | ...));
}
template <class T, int arguments, class Function>
void halfwise(const std::string& name, Function) {
  define(name, [](Context& c) { apply_halfwise<T, Function>(c, std::make_index_sequence<arguments>()); }, 1 + arguments);
}
template <class Result, class... Arguments, class Function>
void elementwise(const std::string& name, Function) {
  define(name, [](Context& c) {
    apply_elementwise<Function, Result, Arguments...>(c, std::index_sequence_for<Arguments...>());
  }, 1 + sizeof...(Arguments));
}

// Shared and global memory, with their checks (memory.cpp). A lane of -1 stands for the whole warp.
u8* shared_at(const Context& c, int lane, u64 address, u64 bytes, u64 alignment);
bool read_shared(const Context& c, int lane, u64 address, u64 bytes);  // true: some byte is undefined
void write_shared(const Context& c, int lane, u64 address, u64 bytes, const u8* value, bool undefined, bool atomic = false);
void addresses_of(const Context& c, int operand, u64* addresses);

// What requests cost (caches.cpp): sectors of global memory, wavefronts of shared memory, different addresses.
enum class Access { read, write, atomic };
void count_sectors(const Context& c, const u64* addresses, u64 bytes, Access access);
void count_banks(const Context& c, const u64* addresses, u32 mask, u64 bytes);
void count_distinct(const Context& c, const u64* addresses);

// Order of global memory by fences and atomics (order.cpp).
void order_by_atomic(const Context& c, u64 address);
void order_by_barrier(Machine& machine);
bool ordered(const Context& c, u32 block, u32 warp, u32 fences);  // before this warp: what that one did with so many fences

void set_noise(bool on, u64 seed);
void reset_tensor_memory();
void check_tensor_memory_is_free(Machine& machine);

// What each file enters; called once.
void define_arithmetic();
void define_conversions();
void define_lane_exchange();
void define_memory();
void define_order();
void define_tensor_cores();
void define_tensor_memory();
