// What a request to global memory costs, counted: sectors of 32 bytes, and how many of them the caches pass on.
//
// The L1 cache is the block's share of its multiprocessor's: empty when the block starts, the sectors that were used
// longest ago leave it first, stores and atomics go past it. The L2 cache holds everything of one launch and nothing
// of the launch before, so that a sector passes it once in each direction.
#include "machine.h"

bool L1::holds(u64 sector) {
  const auto found = places.find(sector);
  if (found != places.end()) {
    order.splice(order.begin(), order, found->second);
    return true;
  }
  order.push_front(sector);
  places[sector] = order.begin();
  if (order.size() > capacity) {
    places.erase(order.back());
    order.pop_back();
  }
  return false;
}

void L1::clear() { order.clear(), places.clear(); }

static std::vector<u64> distinct(std::vector<u64> values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  return values;
}

void count_sectors(const Context& c, const u64* addresses, u64 bytes, Access access) {
  std::vector<u64> sectors;
  for (int lane = 0; lane < 32; lane++)
    if (c.active(lane))
      for (u64 sector = addresses[lane] / 32; sector <= (addresses[lane] + bytes - 1) / 32; sector++) sectors.push_back(sector);
  sectors = distinct(sectors);
  Count& count = c.machine.counts[c.warp.pc];
  count.sectors += sectors.size();
  auto& seen = access == Access::read ? c.machine.sectors_read : c.machine.sectors_written;
  for (u64 sector : sectors) {
    if (access == Access::read && c.machine.l1.holds(sector)) continue;
    count.beyond_l1++;
    count.beyond_l2 += seen.insert(sector).second;
  }
}

void count_banks(const Context& c, const u64* addresses, u32 mask, u64 bytes) {
  const int group = bytes <= 4 ? 32 : bytes <= 8 ? 16 : 8;  // wider accesses go in halves or quarters of a warp
  Count& count = c.machine.counts[c.warp.pc];
  for (int first = 0; first < 32; first += group) {
    std::vector<u64> words;
    for (int lane = first; lane < first + group; lane++)
      if (mask >> lane & 1)
        for (u64 word = addresses[lane] / 4; word <= (addresses[lane] + bytes - 1) / 4; word++) words.push_back(word);
    if (words.empty()) continue;
    u64 of_bank[32] = {0};
    for (u64 word : distinct(words)) of_bank[word % 32]++;
    count.wavefronts += *std::max_element(of_bank, of_bank + 32);
    count.ideal++;
  }
}

void count_distinct(const Context& c, const u64* addresses) {
  std::vector<u64> seen;
  for (int lane = 0; lane < 32; lane++)
    if (c.active(lane)) seen.push_back(addresses[lane]);
  c.machine.counts[c.warp.pc].distinct += distinct(seen).size();
}
