// Order between accesses of global memory that no barrier gives: a warp writes, fences and updates a word atomically;
// another one that updates the same word later, and then fences, sees what the first wrote. A warp has made the fences
// that each of its live lanes has. What a warp learns from others it does not pass on by its own atomics; kernels that
// would need that are reported as races.
#include "machine.h"

static u32 fences_of(const Warp& warp) {
  u32 fewest = ALL;
  for (int lane = 0; lane < 32; lane++)
    if (warp.live >> lane & 1) fewest = std::min(fewest, warp.fences_of_lane[lane]);
  return fewest == ALL ? 0 : fewest;
}

// What a warp's atomic makes known: the fences that each warp of its block had made, as far as barriers tell it.
static std::vector<u32> fences_known(const Warp& warp) {
  std::vector<u32> fences = warp.fences_of_block;
  fences[warp.number] = fences_of(warp);
  return fences;
}

void order_by_atomic(const Context& c, u64 address) {
  std::vector<Release>& releases = c.machine.releases[address];
  if (!releases.empty()) {
    std::vector<Sight>& acquired = c.warp.acquired;
    if (acquired.empty() || acquired.back().address != address) acquired.push_back({address, 0});
    acquired.back().releases = releases.size();
  }
  std::vector<u32> fences = fences_known(c.warp);
  if (std::any_of(fences.begin(), fences.end(), [](u32 n) { return n; })) releases.push_back({c.machine.block, fences});
}

static void merge(std::vector<Sight>& into, const std::vector<Sight>& from) {
  for (const Sight& sight : from) {
    auto same = std::find_if(into.begin(), into.end(), [&](const Sight& other) { return other.address == sight.address; });
    if (same == into.end()) into.push_back(sight);
    else same->releases = std::max(same->releases, sight.releases);
  }
}

void fence_device(Context& c) {
  const u32 before = fences_of(c.warp);
  for (int lane = 0; lane < 32; lane++) c.warp.fences_of_lane[lane] += c.active(lane);
  if (fences_of(c.warp) == before) return;
  merge(c.warp.seen, c.warp.acquired);
  c.warp.acquired.clear();
}

void order_by_barrier(Machine& machine) {
  std::vector<u32> fences;
  std::vector<Sight> acquired, seen;
  for (const Warp& warp : machine.warps) {
    fences.push_back(fences_of(warp));
    merge(acquired, warp.acquired), merge(seen, warp.seen);
  }
  for (Warp& warp : machine.warps) warp.fences_of_block = fences, warp.acquired = acquired, warp.seen = seen;
}

bool ordered(const Context& c, u32 block, u32 warp, u32 fences) {
  for (const Sight& sight : c.warp.seen) {
    const std::vector<Release>& releases = c.machine.releases[sight.address];
    for (size_t k = 0; k < sight.releases; k++)
      if (releases[k].block == block && releases[k].fences[warp] > fences) return true;
  }
  return false;
}

void define_order() { define("fence.device", fence_device); }
