// Runs a launch: one block after the other, and of a block one warp after the other, in an order drawn from the seed.
// Lanes that part at a branch meet again at its immediate post-dominator, which reader.py finds.
#include <sys/mman.h>

#include "machine.h"

static std::vector<Handler>& handlers() {
  static std::vector<Handler> list;
  return list;
}
struct Entry {
  int number, operands;
};
static std::unordered_map<std::string, Entry>& names() {
  static std::unordered_map<std::string, Entry> table;
  return table;
}
void define(const std::string& name, Handler handler, int operands) {
  names()[name] = {int(handlers().size()), operands};
  handlers().push_back(handler);
}
static bool define_all() {
  define_arithmetic(), define_conversions(), define_lane_exchange(), define_memory(), define_order(), define_tensor_cores();
  define_tensor_memory();
  return true;
}

// ----------------------------------------------------------------------------------------------------------- one warp

// Goes on with the lanes that wait; those that have returned are gone.
static void resume(Warp& warp) {
  do {
    const Path path = warp.paths.back();
    warp.paths.pop_back();
    warp.pc = path.pc, warp.mask = path.mask & warp.live, warp.join = path.join;
  } while (!warp.paths.empty() && (!warp.mask || warp.pc == warp.join));
}

static void branch(Machine& machine, Warp& warp, const Instruction& instruction, u32 taken) {
  const int target = instruction.numbers[0], join = instruction.numbers[1];
  if (instruction.guard >= 0)
    if (const u32 bad = warp.undefined[instruction.guard_word] & warp.mask)
      machine.report(UNDEFINED_BRANCH, warp.pc, warp.number, __builtin_ctz(bad), 0);
  const u32 stay = warp.mask & ~taken;
  if (!stay) {
    warp.pc = target;
  } else if (!taken) {
    warp.pc++;
  } else {
    warp.paths.push_back({join, warp.mask, warp.join});
    warp.paths.push_back({target, taken, join});
    warp.mask = stay, warp.join = join, warp.pc++;
  }
}

// bar.red.or has operands: target, predicate. numbers: it is one, the predicate is negated.
static void bring_to_barrier(const Context& c) {
  if (!c.number(0)) return;
  if (const u32 bad = c.undefined(1) & c.mask) c.report(UNDEFINED_BRANCH, __builtin_ctz(bad), 0);
  c.machine.barrier_or |= ((c.number(1) ? ~c.predicate(1) : c.predicate(1)) & c.mask) != 0;
}
static void take_from_barrier(const Context& c) {
  if (!c.number(0)) return;
  c.write_predicate(0, c.machine.barrier_or ? ALL : 0);
  c.set_undefined(0, 0);
}

// Runs until a barrier, the end, or the end of its time.
static void run_warp(Machine& machine, Warp& warp, u64 instructions) {
  warp.paused = false;
  while (instructions-- > 0) {
    if (!warp.mask || warp.pc == warp.join) {
      if (!warp.paths.empty()) resume(warp);
      if (!warp.mask) {
        warp.done = true;
        return;
      }
    }
    const Instruction& instruction = machine.program[warp.pc];
    u32 mask = warp.mask;
    if (instruction.guard >= 0) {
      const u32 guard = *reinterpret_cast<u32*>(warp.registers + instruction.guard);
      mask &= instruction.guard_negated ? ~guard : guard;
    }
    Count& count = machine.counts[warp.pc];
    count.warps++;
    count.lanes += __builtin_popcount(mask);
    const bool over = ++machine.steps > machine.launch.limit;
    if (instruction.handler >= 0 && !over) {
      Context context{machine, warp, instruction, mask};
      if (mask) handlers()[instruction.handler](context);
      warp.pc++;
      if (warp.paused) return;
    } else if (instruction.handler == BRANCH && !over) {
      branch(machine, warp, instruction, mask);
    } else if (instruction.handler == RETURN && !over) {
      warp.live &= ~mask;
      warp.mask &= ~mask;
      warp.pc++;
    } else if (instruction.handler == BARRIER && !over) {
      if (mask != warp.live) machine.report(DIVERGED, warp.pc, warp.number, 0, mask);
      bring_to_barrier(Context{machine, warp, instruction, mask});
      warp.at_barrier = true, warp.barrier_pc = warp.pc++;
      return;
    } else if (mask || over) {
      machine.report(TRAPPED, warp.pc, warp.number, 0, over);
      warp.done = true;
      return;
    } else {
      warp.pc++;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------- one block

static u32 special(const Machine& machine, int which, int thread) {  // in the order of reader.SPECIAL
  const Launch& launch = machine.launch;
  const int* block = launch.block;
  switch (which) {
    case 0: case 1: case 2: return machine.block_at[which];
    case 3: case 4: case 5: return launch.grid[which - 3];
    case 6: return thread % block[0];
    case 7: return thread / block[0] % block[1];
    case 8: return thread / block[0] / block[1];
    case 9: case 10: case 11: return block[which - 9];
    case 12: return thread % 32;
    default: return thread / 32;
  }
}

static void start(Machine& machine, Warp& warp, int number, const std::vector<Constant>& constants, const std::vector<Special>& specials) {
  const Launch& launch = machine.launch;
  const int threads = launch.block[0] * launch.block[1] * launch.block[2] - 32 * number;
  warp.number = number, warp.live = warp.mask = threads >= 32 ? ALL : (1u << threads) - 1;
  warp.pc = 0, warp.join = -1, warp.at_barrier = warp.done = false;
  warp.commits_seen = 0;
  warp.paths.clear(), warp.pending.clear(), warp.async_reads.clear(), warp.copies.clear();
  std::fill(warp.fences_of_lane, warp.fences_of_lane + 32, 0);
  warp.fences_of_block.assign(machine.warps.size(), 0), warp.acquired.clear(), warp.seen.clear();
  memset(warp.registers, 0xff, launch.register_bytes);
  std::fill(warp.undefined, warp.undefined + launch.register_words, ALL);
  auto fill = [&](s32 place, s32 word, s32 high, int width, auto value) {
    warp.undefined[word] = warp.undefined[high] = 0;
    u8* target = warp.registers + place;
    if (width == 1) *reinterpret_cast<u32*>(target) = value(0) ? ALL : 0;
    else
      for (int lane = 0; lane < 32; lane++) {
        const u64 x = value(lane);
        memcpy(target + lane * width, &x, width);
      }
  };
  for (const Constant& constant : constants) fill(constant.place, constant.word, constant.high, constant.width, [&](int) { return constant.value; });
  for (const Special& s : specials)
    fill(s.place, s.word, s.word, 4, [&](int lane) { return u64(special(machine, s.which, 32 * number + lane)); });
}

// All warps have arrived, or have ended, which a block with barriers may not do.
static void pass_barrier(Machine& machine) {
  int pc = -1;
  for (Warp& warp : machine.warps) {
    if (warp.done) {
      machine.report(BARRIER_MISMATCH, machine.warps[0].barrier_pc, warp.number, 0, 0);
      continue;
    }
    if (pc >= 0 && warp.barrier_pc != pc) machine.report(BARRIER_MISMATCH, warp.barrier_pc, warp.number, 0, pc);
    pc = warp.barrier_pc;
    take_from_barrier(Context{machine, warp, machine.program[pc], warp.mask});
    warp.at_barrier = false;
  }
  machine.barrier_or = false;
  machine.epoch++;
  order_by_barrier(machine);
}

static void run_block(Machine& machine, const std::vector<Constant>& constants, const std::vector<Special>& specials) {
  for (SharedByte& byte : machine.shared_bytes) byte.undefined = 1;
  std::fill(machine.shared.begin(), machine.shared.end(), 0xff);
  machine.l1.clear();
  reset_tensor_memory();
  machine.epoch++;
  const int warps = int(machine.warps.size());
  for (int k = 0; k < warps; k++) start(machine, machine.warps[k], k, constants, specials);
  std::vector<int> order(warps);
  for (;;) {
    for (int k = 0; k < warps; k++) order[k] = k;
    if (machine.launch.seed)
      for (int k = warps - 1; k > 0; k--) std::swap(order[k], order[machine.random() % (k + 1)]);
    for (int k : order) {
      Warp& warp = machine.warps[k];
      const u64 quantum = machine.launch.quantum;
      if (!warp.done && !warp.at_barrier) run_warp(machine, warp, quantum ? 1 + machine.random() % quantum : ~u64(0));
    }
    auto all = [&](auto what) { return std::all_of(machine.warps.begin(), machine.warps.end(), what); };
    if (all([](const Warp& warp) { return warp.done; })) break;
    if (all([](const Warp& warp) { return warp.done || warp.at_barrier; })) pass_barrier(machine);
  }
  check_tensor_memory_is_free(machine);
}

// -------------------------------------------------------------------------------------------------------- the interface

static size_t watched_bytes(const Extent& extent) {
  return ((extent.end - extent.begin) / extent.grain + 2) * sizeof(GlobalGrain);
}

extern "C" {

// The number of an instruction with so many operands; -100: there is none.
int engine_handler(const char* name, int operands) {
  static const bool defined = define_all();
  (void)defined;
  const auto found = names().find(name);
  if (found == names().end() || (found->second.operands >= 0 && found->second.operands != operands)) return -100;
  return found->second.number;
}

// Runs `order[0 .. launch->blocks - 1]` of the grid's blocks; returns how many findings were written.
int engine_run(const Launch* launch, const Instruction* program, const Operand* operands, const Constant* constants,
               const Special* specials, const Extent* extents, const u8* parameters, const s32* order, Count* counts,
               Finding* findings, int most_findings) {
  static Machine machine;
  machine.launch = *launch;
  machine.program.assign(program, program + launch->instructions);
  machine.operands.assign(operands, operands + launch->operands);
  machine.extents.assign(extents, extents + launch->extents);
  machine.parameters.assign(parameters, parameters + launch->parameter_bytes);
  machine.shared.assign(launch->shared_bytes + 64, 0);
  machine.shared_bytes.assign(launch->shared_bytes, SharedByte());
  machine.counts.assign(launch->instructions, Count());
  machine.findings.clear(), machine.releases.clear(), machine.barrier_or = false;
  machine.l1.capacity = launch->l1_sectors;
  machine.sectors_read.clear(), machine.sectors_written.clear();
  machine.epoch = 1, machine.steps = 0;
  machine.random_state = launch->seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
  set_noise(launch->noise, launch->seed);
  machine.grains.clear();
  for (const Extent& extent : machine.extents) {  // pages appear as they are touched
    void* pages = mmap(nullptr, watched_bytes(extent), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    machine.grains.push_back(static_cast<GlobalGrain*>(pages));
  }
  const int threads = launch->block[0] * launch->block[1] * launch->block[2];
  machine.warps.assign((threads + 31) / 32, Warp());
  const size_t aligned = (launch->register_bytes + 127) / 64 * 64;
  for (Warp& warp : machine.warps) {
    warp.registers = static_cast<u8*>(aligned_alloc(64, aligned));
    warp.undefined = static_cast<u32*>(malloc(4 * (launch->register_words + 16)));
    warp.fences = warp.turn = 0;
  }
  const std::vector<Constant> all_constants(constants, constants + launch->constants);
  const std::vector<Special> all_specials(specials, specials + launch->specials);
  for (int k = 0; k < launch->blocks; k++) {
    const u32 block = order[k], x = launch->grid[0], y = launch->grid[1];
    machine.block = block;
    machine.block_at[0] = block % x, machine.block_at[1] = block / x % y, machine.block_at[2] = block / x / y;
    run_block(machine, all_constants, all_specials);
  }
  std::copy(machine.counts.begin(), machine.counts.end(), counts);
  for (Warp& warp : machine.warps) free(warp.registers), free(warp.undefined);
  for (size_t k = 0; k < machine.grains.size(); k++) munmap(machine.grains[k], watched_bytes(machine.extents[k]));
  int written = 0;
  for (const auto& [where, finding] : machine.findings)
    if (written < most_findings) findings[written++] = finding;
  return written;
}
}
