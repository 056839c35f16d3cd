// Global memory with stores that arrive late. See machine.cpp.
#include <algorithm>

#include "emulator/state.h"

namespace rnnlm::emulator {
namespace {

std::size_t hash(const uint32_t* p) {
  return reinterpret_cast<std::uintptr_t>(p) / 4 % 1024;
}

void check_aligned(const void* p, std::size_t bytes) {
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(p);
  if (address % bytes == 0) return;
  fail("loads or stores " + std::to_string(bytes) + " bytes at address " + hex(address) +
       ", which is not aligned to that");
}

// Whether the fiber sees the store before it is delivered, and releases it with its own.
bool is_ordered(const Store& store, const Fiber& fiber) {
  const uint32_t thread = fiber.thread.x;
  return store.thread == thread || store.epoch != fiber.cta->epoch ||
         (store.thread / 32 == thread / 32 && store.warp_epoch != fiber.warp->epoch);
}

uint32_t load(const uint32_t* p, Where where) {
  Fiber& f = self();
  // The same address again without a pause, or very many loads: a poll.
  if ((f.loads != 0 && f.loaded_from == p) || f.loads == 64) {
    poll(Waits::kPoll, where);
  } else if (chance(4)) {
    f.waits = Waits::kPoll;
    f.where = where;
    leave();
    f.waits = Waits::kNothing;
  }
  ++f.loads;
  f.mbarrier_missed = false;
  f.loaded_from = p;
  f.loaded_where = where;
  const Cta& cta = *f.cta;
  if (cta.stores_to[hash(p)] != 0) {
    for (std::size_t i = cta.stores.size(); i-- > 0;)
      if (cta.stores[i].p == p && is_ordered(cta.stores[i], f)) return cta.stores[i].value;
  }
  return *p;
}

void arrive(Cta& cta, const Store& store) {
  machine.overwritten[machine.next_overwritten++ % machine.overwritten.size()] = {store.p,
                                                                                  *store.p};
  *store.p = store.value;
  --cta.stores_to[hash(store.p)];
  something_happened();
}

void unlist_if_clean(Cta& cta) {
  if (!cta.stores.empty() || cta.dirty < 0) return;
  machine.dirty.back()->dirty = cta.dirty;
  machine.dirty[static_cast<std::size_t>(cta.dirty)] = machine.dirty.back();
  machine.dirty.pop_back();
  cta.dirty = -1;
}

// Delivers store i, or an older one to the same address.
void deliver_store(Cta& cta, std::size_t i) {
  const uint32_t* p = cta.stores[i].p;
  const auto begin = cta.stores.begin();
  const auto store =
      cta.stores_to[hash(p)] == 1
          ? begin + static_cast<std::ptrdiff_t>(i)
          : std::find_if(begin, cta.stores.end(), [p](const Store& s) { return s.p == p; });
  arrive(cta, *store);
  cta.stores.erase(store);
}

void store(uint32_t* p, uint32_t value) {
  something_happened();
  if (!machine.settings.weak) {
    *p = value;
    return;
  }
  Fiber& f = self();
  Cta& cta = *f.cta;
  constexpr std::size_t kMost = 4096;
  if (cta.stores.size() >= kMost) deliver_first(cta, kMost / 2);
  if (cta.stores.empty()) {
    cta.dirty = static_cast<int>(machine.dirty.size());
    machine.dirty.push_back(&cta);
  }
  cta.stores.push_back({p, value, f.thread.x, cta.epoch, f.warp->epoch, machine.random.below(4)});
  ++cta.stores_to[hash(p)];
  ++machine.stats.delayed_stores;
}

}  // namespace

bool lost() {
  if (machine.settings.drop == 0 || !chance(machine.settings.drop)) return false;
  ++machine.stats.dropped;
  return true;
}

uint32_t load_for_copy(const uint32_t* word) {
  if (machine.settings.stale != 0 && chance(machine.settings.stale)) {
    for (const Overwritten& before : machine.overwritten) {
      if (before.p != word) continue;
      ++machine.stats.stale;
      return before.value;
    }
  }
  return *word;
}

void deliver_some_stores() {
  if (machine.dirty.empty() || !chance(4)) return;
  Random& random = machine.random;
  Cta& cta = *machine.dirty[random.below(machine.dirty.size())];
  std::size_t size = cta.stores.size();
  for (uint32_t n = 1 + random.below(1 + size / 4); n != 0; --n) {
    const uint32_t i = random.below(size);
    if (machine.turns < machine.stalled_until && cta.stores[i].channel == machine.stalled_channel)
      continue;
    deliver_store(cta, i);
    --size;
  }
  unlist_if_clean(cta);
}

void deliver_first(Cta& cta, std::size_t count) {
  const auto begin = cta.stores.begin(), end = begin + static_cast<std::ptrdiff_t>(count);
  std::for_each(begin, end, [&](const Store& store) { arrive(cta, store); });
  cta.stores.erase(begin, end);
  unlist_if_clean(cta);
}

void deliver_ordered(Fiber& fiber) {
  Cta& cta = *fiber.cta;
  std::vector<Store> kept;
  for (const Store& store : cta.stores) {
    if (!is_ordered(store, fiber)) {
      kept.push_back(store);
      continue;
    }
    // An older one to the same address goes first, and is overwritten at once.
    const auto gone = std::remove_if(kept.begin(), kept.end(),
                                     [&](const Store& older) { return older.p == store.p; });
    std::for_each(gone, kept.end(), [&](const Store&) { --cta.stores_to[hash(store.p)]; });
    kept.erase(gone, kept.end());
    arrive(cta, store);
  }
  cta.stores = kept;
  unlist_if_clean(cta);
}

}  // namespace rnnlm::emulator

namespace rnnlm::ptx {

using namespace emulator;

uint32_t ld_relaxed(const uint32_t* p, Where where) {
  check_aligned(p, 4);
  return load(p, where);
}
uint4 ld_relaxed_v4(const uint4* p, Where where) {
  check_aligned(p, 16);
  const uint32_t* words = reinterpret_cast<const uint32_t*>(p);
  uint4 v;
  v.x = load(words, where);
  v.y = load(words + 1, where);
  v.z = load(words + 2, where);
  v.w = load(words + 3, where);
  return v;
}
uint32_t ld_acquire(const uint32_t* p, Where where) {
  return ld_relaxed(p, where);
}
void st_relaxed(uint32_t* p, uint32_t v) {
  check_aligned(p, 4);
  if (!lost()) store(p, v);
}
void st_relaxed_v4(uint4* p, uint4 v) {
  check_aligned(p, 16);
  if (lost()) return;
  uint32_t* words = reinterpret_cast<uint32_t*>(p);
  store(words, v.x);
  store(words + 1, v.y);
  store(words + 2, v.z);
  store(words + 3, v.w);
}
void st_release(uint32_t* p, uint32_t v) {
  check_aligned(p, 4);
  if (lost()) return;
  deliver_ordered(self());
  something_happened();
  *p = v;
}
void red_release_add(uint32_t* p, uint32_t v) {
  check_aligned(p, 4);
  if (lost()) return;
  deliver_ordered(self());
  something_happened();
  *p += v;
}
void st_weak(uint32_t* p, uint32_t v) {
  check_aligned(p, 4);
  store(p, v);
}
void pause(Where where) {
  // In a loop around mbarrier_try_wait the mbarrier is what it waits for.
  const Fiber& f = self();
  poll(f.mbarrier_missed ? Waits::kMbarrier : Waits::kPoll, f.mbarrier_missed ? f.where : where);
}
uint64_t nanoseconds() {
  return static_cast<uint64_t>(machine.time += 1);
}
void wait_for_earlier_launches() {
  self().cta->waits_for_earlier = true;
}

}  // namespace rnnlm::ptx
