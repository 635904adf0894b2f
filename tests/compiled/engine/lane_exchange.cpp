// Instructions between the lanes of a warp. Each needs every live lane of its mask at once.
#include "machine.h"

// Operands: target, source, b, c, mask[, predicate]. numbers[0]: 0 bfly, 1 idx, 2 up, 3 down.
void shuffle(Context& c) {
  const u32 *source = c.reg<u32>(1), *b = c.reg<u32>(2), *clamps = c.reg<u32>(3);
  const u32 source_undefined = c.undefined(1);
  u32 results[32], undefined = 0, valid = 0;
  c.needs(c.reg<u32>(4)[c.first_lane()]);
  for (int lane = 0; lane < 32; lane++) {
    const u32 segment = clamps[lane] >> 8 & 31, clamp = clamps[lane] & 31, by = b[lane] & 31;
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int from;
    bool inside;
    switch (c.number(0)) {
      case 0: from = lane ^ by, inside = from <= last; break;
      case 1: from = first | (by & ~segment & 31), inside = from <= last; break;
      case 2: from = lane - int(by), inside = from >= last; break;
      default: from = lane + int(by), inside = from <= last;
    }
    from = inside ? from & 31 : lane;
    if (c.active(lane) && !c.active(from)) undefined |= 1u << lane;  // that lane is elsewhere
    results[lane] = source[from];
    undefined |= (source_undefined >> from & 1) << lane;
    valid |= u32(inside) << lane;
  }
  c.write(0, results);
  c.set_undefined(0, undefined | c.undefined(2));
  if (c.instruction.count > 5) {
    c.write_predicate(5, valid);
    c.set_undefined(5, 0);
  }
}

// Operands: target, source, mask.
// numbers[0]: 0 add, 1 min.s, 2 max.s, 3 min.u, 4 max.u, 5 and, 6 or, 7 xor, 8 min.f32, 9 max.f32.
void reduce(Context& c) {
  const u32* source = c.reg<u32>(1);
  c.needs(c.reg<u32>(2)[c.first_lane()]);
  u32 result = source[c.first_lane()];
  for (int lane = c.first_lane() + 1; lane < 32; lane++) {
    if (!c.active(lane)) continue;
    const u32 x = source[lane];
    switch (c.number(0)) {
      case 0: result += x; break;
      case 1: result = std::min(s32(result), s32(x)); break;
      case 2: result = std::max(s32(result), s32(x)); break;
      case 3: result = std::min(result, x); break;
      case 4: result = std::max(result, x); break;
      case 5: result &= x; break;
      case 6: result |= x; break;
      case 7: result ^= x; break;
      case 8: result = bits_of(minimum(as_float(result), as_float(x))); break;
      default: result = bits_of(maximum(as_float(result), as_float(x)));
    }
  }
  u32 results[32];
  std::fill(results, results + 32, result);
  c.write(0, results);
  c.set_undefined(0, c.undefined(1) & c.mask ? ALL : 0);
}

// Operands: target, predicate, mask. numbers: 0 ballot, 1 any, 2 all, 3 uni; the predicate is negated.
void vote(Context& c) {
  const u32 said = (c.number(1) ? ~c.predicate(1) : c.predicate(1)) & c.mask;
  c.needs(c.reg<u32>(2)[c.first_lane()]);
  if (c.number(0) == 0) {
    u32 results[32];
    std::fill(results, results + 32, said);
    c.write(0, results);
  } else {
    const bool all = said == c.mask, none = said == 0;
    const bool result = c.number(0) == 1 ? !none : c.number(0) == 2 ? all : all || none;
    c.write_predicate(0, result ? ALL : 0);
  }
  c.set_undefined(0, c.undefined(1) & c.mask ? ALL : 0);
}

// Operands: target, source, mask.
template <class T>
void match_any(Context& c) {
  const T* source = c.reg<T>(1);
  c.needs(c.reg<u32>(2)[c.first_lane()]);
  u32 results[32] = {0};
  for (int lane = 0; lane < 32; lane++)
    for (int other = 0; other < 32; other++)
      if (c.active(other) && source[other] == source[lane]) results[lane] |= 1u << other;
  c.write(0, results);
  c.set_undefined(0, c.undefined(1) & c.mask ? ALL : 0);
}

void warp_barrier(Context& c) {
  c.needs(ALL);
  c.warp.turn++;
}

void define_lane_exchange() {
  define("shfl", shuffle);
  define("redux", reduce);
  define("vote", vote);
  define("match.any.b32", match_any<u32>), define("match.any.b64", match_any<u64>);
  define("warp.barrier", warp_barrier);
  define("nop", [](Context&) {});
}
