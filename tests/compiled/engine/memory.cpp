// Loads, stores and atomics, and what is checked at each: bounds, alignment, undefined bytes, and races.
//
// Accesses of different warps between the same two barriers have no order, nor have accesses of different blocks. Two
// of them race if one writes, unless both are atomic. Writes of the value that is there already are kept apart, since
// they leave the same bits in any order.
#include "machine.h"

// ------------------------------------------------------------------------------------------------------ shared memory

u8* shared_at(const Context& c, int lane, u64 address, u64 bytes, u64 alignment) {
  const Launch& launch = c.machine.launch;
  const u64 begin = launch.shared_base, end = begin + launch.shared_bytes;
  if (address < begin || address + bytes > end) {
    c.report(SHARED_BOUNDS, lane, address, int(bytes));
    return nullptr;
  }
  if (address % alignment) c.report(SHARED_ALIGNMENT, lane, address, int(alignment));
  return c.machine.shared.data() + (address - begin);
}

bool read_shared(const Context& c, int lane, u64 address, u64 bytes) {
  const Machine& machine = c.machine;
  const Warp& warp = c.warp;
  bool undefined = false;
  for (u64 k = address - machine.launch.shared_base, end = k + bytes; k < end; k++) {
    SharedByte& byte = c.machine.shared_bytes[k];
    if (byte.write_epoch == machine.epoch) {
      if (byte.writer != warp.number) c.report(SHARED_RACE, lane, address, byte.writer);
      else if (byte.writer_lane != u8(lane) && byte.turn == warp.turn) c.report(WARP_RACE, lane, address, byte.writer_lane);
    }
    if (byte.read_epoch != machine.epoch) byte.read_epoch = machine.epoch, byte.readers = 0;
    byte.readers |= 1u << warp.number;
    undefined |= byte.undefined;
  }
  return undefined;
}

void write_shared(const Context& c, int lane, u64 address, u64 bytes, const u8* value, bool undefined, bool atomic) {
  const Machine& machine = c.machine;
  const Warp& warp = c.warp;
  for (u64 k = address - machine.launch.shared_base, j = 0; j < bytes; k++, j++) {
    SharedByte& byte = c.machine.shared_bytes[k];
    const bool same = value && machine.shared[k] == value[j];
    if (byte.write_epoch == machine.epoch && byte.writer != warp.number && !(atomic && byte.atomic))
      c.report(same && !atomic && !byte.atomic ? SAME_VALUE_SHARED : SHARED_RACE, lane, address, byte.writer);
    const u32 others = byte.readers & ~(1u << warp.number);
    if (byte.read_epoch == machine.epoch && others && !atomic) c.report(SHARED_RACE, lane, address, __builtin_ctz(others));
    if (byte.step == machine.steps && value && !same) c.report(LANES_DISAGREE, lane, address);
    byte.write_epoch = machine.epoch, byte.writer = warp.number, byte.writer_lane = lane, byte.turn = warp.turn;
    byte.fences = warp.fences, byte.atomic = atomic, byte.undefined = undefined, byte.step = machine.steps;
  }
}

// ------------------------------------------------------------------------------------------------------ global memory

static int extent_of(const Machine& machine, u64 address, u64 bytes) {
  const auto& extents = machine.extents;  // in ascending order
  auto found = std::partition_point(extents.begin(), extents.end(), [&](const Extent& e) { return e.end <= address; });
  if (found == extents.end() || address < found->begin || address + bytes > found->end) return -1;
  return int(found - extents.begin());
}

// The number of the extent, -1 where there is none.
static int global_at(const Context& c, int lane, u64 address, u64 bytes) {
  if (address % bytes) c.report(GLOBAL_ALIGNMENT, lane, address, int(bytes));
  const int which = extent_of(c.machine, address, bytes);
  if (which < 0) c.report(GLOBAL_BOUNDS, lane, address, int(bytes));
  return which;
}

static bool undefined_global(const Extent& extent, u64 address, u64 bytes) {
  if (!extent.undefined) return false;
  const u8* marks = extent.undefined + (address - extent.begin);
  return std::any_of(marks, marks + bytes, [](u8 mark) { return mark; });
}

// By this launch.
static bool written(const Machine& machine, int which, u64 address) {
  const Extent& extent = machine.extents[which];
  return machine.grains[which][(address - extent.begin) / extent.grain].write_block;
}

static void watch_race(const Context& c, int lane, int which, u64 address, u64 bytes, Access access, const u8* value) {
  const Extent& extent = c.machine.extents[which];
  const u32 block = c.machine.block + 1, epoch = c.machine.epoch, self = 1u << c.warp.number;
  const bool same = access == Access::write && !memcmp(reinterpret_cast<const void*>(address), value, bytes);
  const u64 first = (address - extent.begin) / extent.grain, last = (address + bytes - 1 - extent.begin) / extent.grain;
  for (u64 k = first; k <= last; k++) {
    GlobalGrain& grain = c.machine.grains[which][k];
    auto unordered = [&](u32 by, u32 warp, u32 fences) { return !ordered(c, by - 1, warp, fences); };
    const bool written_elsewhere = grain.write_block && grain.write_block != block &&
                                   unordered(grain.write_block, grain.writer, grain.write_fences);
    const bool written_here = grain.write_block == block && grain.write_epoch == epoch &&
                              grain.writer != c.warp.number && unordered(block, grain.writer, grain.write_fences);
    if (access == Access::read) {
      if (written_elsewhere) c.report(GRID_RACE, lane, address, grain.write_block - 1);
      if (written_here) c.report(BLOCK_RACE, lane, address, grain.writer);
      if (grain.read_block != block || grain.read_epoch != epoch) grain.readers = 0;
      grain.readers |= self, grain.read_epoch = epoch, grain.read_fences = c.warp.fences_of_lane[lane];
      grain.read_block = grain.read_block == 0 || grain.read_block == block ? block : ALL;
      continue;
    }
    if (!(access == Access::atomic && grain.atomic)) {
      const bool harmless = same && !grain.atomic;
      if (written_elsewhere) c.report(harmless ? SAME_VALUE_GLOBAL : GRID_RACE, lane, address, grain.write_block - 1);
      if (written_here) c.report(harmless ? SAME_VALUE_GLOBAL : BLOCK_RACE, lane, address, grain.writer);
    }
    const bool read_here = grain.read_block == block;
    const u32 others = read_here ? grain.readers & ~self : grain.readers;
    if (grain.read_block == ALL) {
      c.report(GRID_RACE, lane, address, -1);
    } else if (grain.read_block && (!read_here || grain.read_epoch == epoch)) {
      for (u32 warp = 0; warp < 32; warp++)
        if (others >> warp & 1 && unordered(grain.read_block, warp, grain.read_fences))
          c.report(read_here ? BLOCK_RACE : GRID_RACE, lane, address, read_here ? int(warp) : int(grain.read_block - 1));
    }
    if (access == Access::write && grain.write_block == block && grain.step == u32(c.machine.steps) && !same)
      c.report(LANES_DISAGREE, lane, address);
    grain.write_block = block, grain.write_epoch = epoch, grain.writer = c.warp.number;
    grain.write_fences = c.warp.fences_of_lane[lane], grain.atomic = access == Access::atomic, grain.step = u32(c.machine.steps);
  }
}

// ------------------------------------------------------------------------------------------------------- instructions
// numbers of loads and stores: bytes of an element, it is signed, elements, bytes of a register, offset, bytes of the
// address, by way of the cache for read-only data. Operands of loads: targets, address; of stores: address, values.

void addresses_of(const Context& c, int operand, u64* addresses) {
  const u64 offset = s64(c.number(4));
  const bool wide = c.number(5) == 8;
  for (int lane = 0; lane < 32; lane++)
    addresses[lane] = wide ? c.reg<u64>(operand)[lane] + offset : u32(c.reg<u32>(operand)[lane] + offset);
  if (const u32 bad = c.undefined(operand) & c.mask) {
    const int lane = __builtin_ctz(bad);
    c.report(UNDEFINED_ADDRESS, lane, addresses[lane]);
  }
  if (const u32 bad = c.undefined_guard() & c.warp.mask) c.report(UNDEFINED_BRANCH, __builtin_ctz(bad), 0);
}

struct Transfer {
  const int bytes, is_signed, elements, width;
  const u64 total;
  explicit Transfer(const Context& c)
      : bytes(c.number(0)), is_signed(c.number(1)), elements(c.number(2)), width(c.number(3)), total(u64(bytes) * elements) {}
};

void load_global(Context& c) {
  const Transfer t(c);
  u64 addresses[32];
  addresses_of(c, t.elements, addresses);
  if (c.machine.launch.count_memory) count_sectors(c, addresses, t.total, Access::read);
  u32 undefined[8] = {0};
  for (int lane = 0; lane < 32; lane++) {
    if (!c.active(lane)) continue;
    const u64 address = addresses[lane];
    const int which = global_at(c, lane, address, t.total);
    for (int k = 0; k < t.elements; k++) {
      const u64 at = address + k * t.bytes;
      if (which < 0 || undefined_global(c.machine.extents[which], at, t.bytes)) undefined[k] |= 1u << lane;
      u64 value = 0;
      if (which >= 0) memcpy(&value, reinterpret_cast<const void*>(at), t.bytes);
      c.write(k, lane, t.width, extended(value, t.bytes, t.is_signed));
    }
    if (which < 0) continue;
    if (c.number(6) && written(c.machine, which, address)) c.report(READ_ONLY_CACHE, lane, address);
    watch_race(c, lane, which, address, t.total, Access::read, nullptr);
  }
  for (int k = 0; k < t.elements; k++) {
    if (undefined[k]) c.report(UNDEFINED_READ, __builtin_ctz(undefined[k]), addresses[__builtin_ctz(undefined[k])]);
    c.set_undefined(k, undefined[k]);
  }
}

void store_global(Context& c) {
  const Transfer t(c);
  u64 addresses[32];
  addresses_of(c, 0, addresses);
  if (c.machine.launch.count_memory) count_sectors(c, addresses, t.total, Access::write);
  for (int lane = 0; lane < 32; lane++) {
    if (!c.active(lane)) continue;
    const u64 address = addresses[lane];
    const int which = global_at(c, lane, address, t.total);
    if (which < 0) continue;
    Extent& extent = c.machine.extents[which];
    u8 value[64];
    for (int k = 0; k < t.elements; k++) {
      const u64 x = c.read(1 + k, lane, t.width);
      memcpy(value + k * t.bytes, &x, t.bytes);
      const bool undefined = c.undefined(1 + k) >> lane & 1;
      if (undefined) c.report(UNDEFINED_STORE, lane, address + k * t.bytes);
      if (extent.undefined) memset(extent.undefined + (address + k * t.bytes - extent.begin), undefined, t.bytes);
    }
    watch_race(c, lane, which, address, t.total, Access::write, value);
    memcpy(reinterpret_cast<void*>(address), value, t.total);
  }
}

void load_shared(Context& c) {
  const Transfer t(c);
  u64 addresses[32];
  addresses_of(c, t.elements, addresses);
  if (c.machine.launch.count_memory) count_banks(c, addresses, c.mask, t.total);
  u32 undefined[8] = {0};
  for (int lane = 0; lane < 32; lane++) {
    if (!c.active(lane)) continue;
    const u8* bytes = shared_at(c, lane, addresses[lane], t.total, t.total);
    for (int k = 0; k < t.elements; k++) {
      const bool bad = !bytes || read_shared(c, lane, addresses[lane] + k * t.bytes, t.bytes);
      if (bad) undefined[k] |= 1u << lane;
      u64 value = 0;
      if (bytes) memcpy(&value, bytes + k * t.bytes, t.bytes);
      c.write(k, lane, t.width, extended(value, t.bytes, t.is_signed));
    }
  }
  for (int k = 0; k < t.elements; k++) c.set_undefined(k, undefined[k]);
}

void store_shared(Context& c) {
  const Transfer t(c);
  u64 addresses[32];
  addresses_of(c, 0, addresses);
  if (c.machine.launch.count_memory) count_banks(c, addresses, c.mask, t.total);
  for (int lane = 0; lane < 32; lane++) {
    if (!c.active(lane)) continue;
    u8* bytes = shared_at(c, lane, addresses[lane], t.total, t.total);
    if (!bytes) continue;
    for (int k = 0; k < t.elements; k++) {
      const u64 x = c.read(1 + k, lane, t.width);
      const bool undefined = c.undefined(1 + k) >> lane & 1;
      write_shared(c, lane, addresses[lane] + k * t.bytes, t.bytes, reinterpret_cast<const u8*>(&x), undefined);
      memcpy(bytes + k * t.bytes, &x, t.bytes);
    }
  }
}

// Copies from global to shared memory beside the program. Operands: address in shared memory, in global memory, bytes to
// read (0: zeros are written). numbers: bytes, -, -, -, offset and bytes of the shared address, of the global address.
// Until the warp has waited for their group the bytes are undefined; then they count as written there and then.
void copy_async(Context& c) {
  const u64 bytes = c.number(0);
  u64 to[32], from[32];
  addresses_of(c, 0, to);
  u32 reading = 0;
  for (int lane = 0; lane < 32; lane++) {
    from[lane] = c.number(7) == 8 ? c.reg<u64>(1)[lane] + s64(c.number(6)) : u32(c.reg<u32>(1)[lane] + c.number(6));
    if (c.active(lane) && c.reg<u32>(2)[lane]) reading |= 1u << lane;
  }
  if (const u32 bad = (c.undefined(1) | c.undefined(2)) & c.mask) c.report(UNDEFINED_ADDRESS, __builtin_ctz(bad), from[__builtin_ctz(bad)]);
  Context reads{c.machine, c.warp, c.instruction, reading};
  if (c.machine.launch.count_memory) {
    count_banks(c, to, c.mask, bytes);
    if (reading) count_sectors(reads, from, bytes, Access::read);
  }
  if (c.warp.copies.empty()) c.warp.copies.emplace_back();
  for (int lane = 0; lane < 32; lane++) {
    if (!c.active(lane)) continue;
    Copy copy{u32(to[lane]), u32(bytes), u8(lane), 0, c.warp.fences, {0}};
    if (reading >> lane & 1) {
      const u64 size = c.reg<u32>(2)[lane];
      const int which = global_at(c, lane, from[lane], size);
      if (which < 0) continue;
      memcpy(copy.value, reinterpret_cast<const void*>(from[lane]), size);
      copy.undefined = undefined_global(c.machine.extents[which], from[lane], size);
      watch_race(c, lane, which, from[lane], size, Access::read, nullptr);
    }
    if (!shared_at(c, lane, to[lane], bytes, bytes)) continue;
    write_shared(c, lane, to[lane], bytes, nullptr, true);
    c.warp.copies.back().push_back(copy);
  }
}

void commit_copies(Context& c) {
  if (c.warp.copies.empty()) c.warp.copies.emplace_back();
  c.warp.copies.emplace_back();
}

// numbers[0]: groups that may still run.
void wait_copies(Context& c) {
  auto& groups = c.warp.copies;
  const size_t committed = groups.empty() ? 0 : groups.size() - 1, running = c.number(0);
  for (size_t k = 0; k + running < committed; k++)
    for (const Copy& copy : groups[k]) {
      write_shared(c, copy.lane, copy.address, copy.bytes, nullptr, copy.undefined);
      const u64 at = copy.address - c.machine.launch.shared_base;
      memcpy(c.machine.shared.data() + at, copy.value, copy.bytes);
      for (u64 j = 0; j < copy.bytes; j++) c.machine.shared_bytes[at + j].fences = copy.fences;
    }
  if (committed > running) groups.erase(groups.begin(), groups.begin() + (committed - running));
}

void load_parameter(Context& c) {
  const Transfer t(c);
  u64 addresses[32];
  addresses_of(c, t.elements, addresses);
  for (int lane = 0; lane < 32; lane++) {
    if (!c.active(lane)) continue;
    for (int k = 0; k < t.elements; k++) {
      const u64 at = addresses[lane] + k * t.bytes;
      u64 value = 0;
      if (at + t.bytes > c.machine.parameters.size() || at % t.bytes) c.report(PARAMETER_BOUNDS, lane, at);
      else memcpy(&value, c.machine.parameters.data() + at, t.bytes);
      c.write(k, lane, t.width, extended(value, t.bytes, t.is_signed));
    }
  }
  for (int k = 0; k < t.elements; k++) c.set_undefined(k, 0);
}

// ------------------------------------------------------------------------------------------------------------ atomics

enum class Number { is_unsigned, is_signed, floating };
enum class Update { add, min, max, bit_and, bit_or, bit_xor, exchange, compare_exchange };

template <class F, class U>
U updated_float(U old, U value, Update update) {
  const F x = bits_as<F>(old), y = bits_as<F>(value);
  return bits_as<U>(update == Update::add ? F(x + y) : update == Update::min ? minimum(x, y) : maximum(x, y));
}

static u64 updated(u64 old, u64 value, u64 second, int bytes, Number kind, Update update) {
  if (update == Update::exchange) return value;
  if (update == Update::compare_exchange) return old == value ? second : old;
  if (kind == Number::floating)
    return bytes == 4 ? updated_float<float>(u32(old), u32(value), update) : updated_float<double>(old, value, update);
  const bool less = kind == Number::is_signed ? s64(extended(old, bytes, true)) < s64(extended(value, bytes, true)) : old < value;
  switch (update) {
    case Update::add: return old + value;
    case Update::min: return less ? old : value;
    case Update::max: return less ? value : old;
    case Update::bit_and: return old & value;
    case Update::bit_or: return old | value;
    default: return old ^ value;
  }
}

// Operands: old value or a sink, address, value[, second]. numbers: bytes, Number, Update, in shared memory, offset,
// bytes of the address.
void atomic(Context& c) {
  const int bytes = c.number(0);
  const Update update = Update(c.number(2));
  const bool shared = c.number(3);
  u64 addresses[32];
  addresses_of(c, 1, addresses);
  if (c.machine.launch.count_memory) {
    if (shared) count_banks(c, addresses, c.mask, bytes);
    else count_sectors(c, addresses, bytes, Access::atomic);
    count_distinct(c, addresses);
  }
  if (const u32 bad = c.undefined(2) & c.mask) c.report(UNDEFINED_ATOMIC, __builtin_ctz(bad), addresses[__builtin_ctz(bad)]);
  u32 undefined = 0;
  for (int lane = 0; lane < 32; lane++) {
    if (!c.active(lane)) continue;
    const u64 address = addresses[lane];
    u8* place;
    bool bad = false;
    if (shared) {
      place = shared_at(c, lane, address, bytes, bytes);
      if (!place) continue;
      const SharedByte* first = &c.machine.shared_bytes[address - c.machine.launch.shared_base];
      bad = std::any_of(first, first + bytes, [](const SharedByte& byte) { return byte.undefined; });
      write_shared(c, lane, address, bytes, nullptr, bad, true);
    } else {
      const int which = global_at(c, lane, address, bytes);
      if (which < 0) continue;
      place = reinterpret_cast<u8*>(address);
      bad = undefined_global(c.machine.extents[which], address, bytes);
      order_by_atomic(c, address);
      watch_race(c, lane, which, address, bytes, Access::atomic, nullptr);
    }
    if (bad) {
      c.report(UNDEFINED_ATOMIC, lane, address);
      undefined |= 1u << lane;
    }
    u64 old = 0;
    memcpy(&old, place, bytes);
    const u64 second = update == Update::compare_exchange ? c.read(3, lane, bytes) : 0;
    const u64 result = updated(old, c.read(2, lane, bytes), second, bytes, Number(c.number(1)), update);
    memcpy(place, &result, bytes);
    c.write(0, lane, bytes, old);
  }
  c.set_undefined(0, undefined);
}

void define_memory() {
  define("ld.global", load_global), define("st.global", store_global);
  define("ld.shared", load_shared), define("st.shared", store_shared);
  define("ld.param", load_parameter);
  define("atom", atomic);
  define("cp.async", copy_async, 3), define("cp.async.commit", commit_copies), define("cp.async.wait", wait_copies);
}
