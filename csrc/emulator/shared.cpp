// Shared memory with fences around it, and what the CTAs of a cluster do with each other's:
// messages (st.async, multicast copies), mbarriers and the cluster barrier. See machine.cpp.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "emulator/state.h"

namespace rnnlm::emulator {
namespace {

constexpr uint32_t kPoison = 0x7FF57FF5u;  // a NaN as float, double, bfloat16 and float16
constexpr uint32_t kFence = 0x7FF67FF6u;
constexpr std::size_t kFenceBytes = 1024;
constexpr std::size_t kNearBytes = 64;  // of a fence, checked each time a thread has run
constexpr std::size_t kPage = 16 * 1024;
constexpr int kOffsetBits = 18;
constexpr uint32_t kOffsetMask = (1u << kOffsetBits) - 1;
static_assert(kMaxShared == 1u << kOffsetBits);

unsigned char* arena;
std::size_t arena_stride, arena_ctas;

// Bytes between the start of the slot and that of the CTA's memory. A slot is
// [guard page, spare, fence, shared memory, fence], and the next slot's guard page follows.
std::size_t shared_start() {
  return arena_stride - kFenceBytes - (machine.shape.shared + 127) / 128 * 128;
}

std::size_t fenced_bytes() {
  return (machine.shape.shared + 3) / 4 * 4;
}

Cta& cta_at(uint32_t address, const char* what) {
  const uint32_t rank = (address >> kOffsetBits) - 1;
  if (rank >= machine.shape.cluster) fail(std::string(what) + ": no shared address of the cluster");
  return self().cta->rank_0[rank];
}

// The offset of `bytes` aligned bytes that lie in shared memory.
uint32_t offset_of(uint32_t address, std::size_t bytes, const char* what) {
  const uint32_t offset = address & kOffsetMask;
  if (offset + bytes > machine.shape.shared || offset % bytes != 0)
    fail(std::string(what) + ": not an aligned address within shared memory");
  return offset;
}

Mbarrier* find_mbarrier(Cta& cta, uint32_t offset) {
  for (Mbarrier& m : cta.mbarriers)
    if (m.offset == offset) return &m;
  return nullptr;
}

std::string name_of_mbarrier(const Cta& cta, uint32_t offset) {
  return "the mbarrier at byte " + std::to_string(offset) + " of CTA " + std::to_string(cta.index);
}

Mbarrier& own_mbarrier(uint32_t address, const char* what) {
  Cta& cta = *self().cta;
  const uint32_t offset = offset_of(address, 8, what);
  if (&cta_at(address, what) != &cta) fail(std::string(what) + ": address of another CTA");
  Mbarrier* m = find_mbarrier(cta, offset);
  if (m == nullptr)
    fail(std::string(what) + ": nothing has initialised " + name_of_mbarrier(cta, offset));
  return *m;
}

void count(Cta& cta, Mbarrier& m, uint32_t arrivals, int64_t bytes) {
  m.pending -= arrivals;
  m.bytes += bytes;
  something_happened();
  if (m.bytes >= 1 << 20 || m.bytes <= -(1 << 20))
    report(name_of_mbarrier(cta, m.offset) + " counts more than 2^20 bytes");
  if (m.pending != 0 || m.bytes != 0) return;
  m.pending = m.expected;
  ++m.phase;
}

void deliver_message() {
  const std::size_t i = machine.random.below(machine.messages.size());
  const Message message = machine.messages[i];
  machine.messages[i] = machine.messages.back();
  machine.messages.pop_back();
  Cta& cta = *message.target;
  --cta.messages;
  uint4 words = message.words;
  if (const uint32_t* from = message.from) {
    words = {load_for_copy(from), load_for_copy(from + 1), load_for_copy(from + 2),
             load_for_copy(from + 3)};
  }
  std::memcpy(cta.shared + message.offset, &words, sizeof(words));
  Mbarrier* m = find_mbarrier(cta, message.mbarrier);
  if (m == nullptr || (message.from_other_cta && !m->fenced)) {
    return report("a message to " + name_of_mbarrier(cta, message.mbarrier) + " before " +
                  (m == nullptr ? "mbarrier_init()" : "mbarrier_init_fence()"));
  }
  count(cta, *m, 0, -16);
}

void check_running(const Cta& target, const char* what) {
  if (target.alive != 0 && target.begun) return;
  fail(std::string(what) + " to the shared memory of CTA " + std::to_string(target.index) +
       (target.begun ? ", which has ended" : ", which may not have started") +
       ": a cluster barrier must keep it");
}

void fence_mbarriers() {
  for (Mbarrier& m : self().cta->mbarriers) m.fenced = true;
}

void arrive_at_cluster() {
  Fiber& f = self();
  Cluster& cluster = *f.cta->cluster;
  if (f.arrived) fail("cluster_arrive twice without a cluster_wait between");
  f.arrived = true;
  f.generation = cluster.generation;
  if (++cluster.arrived == cluster.alive) complete_cluster(cluster);
}

}  // namespace

void deliver_some_messages() {
  if (machine.messages.empty() || !chance(4)) return;
  for (uint32_t n = 1 + machine.random.below(1 + machine.messages.size() / 4); n != 0; --n) {
    deliver_message();
    if (!machine.error.empty()) return;
  }
}

void complete_cluster(Cluster& cluster) {
  something_happened();
  cluster.arrived = 0;
  ++cluster.generation;
  for (Fiber& f : machine.fibers)
    if (f.waits == Waits::kCluster && f.cta->cluster == &cluster) wake(*f.warp, f.lane_bit);
}

bool reserve_shared(std::size_t bytes, std::size_t ctas) {
  const std::size_t stride = (2 * kPage + 2 * kFenceBytes + bytes + 127) / kPage * kPage;
  if (stride <= arena_stride && ctas <= arena_ctas) return true;
  if (arena != nullptr) munmap(arena, arena_stride * arena_ctas + kPage);
  arena_stride = std::max(stride, arena_stride);
  arena_ctas = std::max(ctas, arena_ctas);
  void* mapped = mmap(nullptr, arena_stride * arena_ctas + kPage, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  arena = mapped == MAP_FAILED ? nullptr : static_cast<unsigned char*>(mapped);
  if (arena == nullptr) {
    arena_stride = arena_ctas = 0;
    return false;
  }
  // Where the system refuses a guard page the fences remain.
  for (std::size_t i = 0; i <= arena_ctas; ++i)
    (void)mprotect(arena + i * arena_stride, kPage, PROT_NONE);
  return true;
}

void place_shared(Cta& cta, std::size_t slot) {
  cta.shared = arena + slot * arena_stride + shared_start();
  uint32_t* words = reinterpret_cast<uint32_t*>(cta.shared);
  std::fill_n(words - kFenceBytes / 4, kFenceBytes / 4, kFence);
  std::fill_n(words, fenced_bytes() / 4, kPoison);
  std::fill_n(words + fenced_bytes() / 4, kFenceBytes / 4, kFence);
}

void check_fences(const Cta& cta, bool all) {
  static const std::vector<uint32_t> intact(kFenceBytes / 4, kFence);
  const std::size_t bytes = all ? kFenceBytes : kNearBytes;
  const unsigned char* above = cta.shared + fenced_bytes();
  const bool below_intact = std::memcmp(cta.shared - bytes, intact.data(), bytes) == 0;
  if (below_intact && std::memcmp(above, intact.data(), bytes) == 0) return;
  const unsigned char* p = below_intact ? above : cta.shared - bytes;
  const unsigned char* expected = reinterpret_cast<const unsigned char*>(intact.data());
  while (*p == *expected) ++p, ++expected;
  std::string text = "CTA " + std::to_string(cta.index) + ": byte " +
                     std::to_string(p - cta.shared) + " of its " +
                     std::to_string(machine.shape.shared) + " bytes of shared memory was written";
  if (current != nullptr) {
    text += (all ? "; seen at the barrier of thread " : " by thread ") +
            std::to_string(current->thread.x);
  }
  report(text);
}

}  // namespace rnnlm::emulator

namespace rnnlm::ptx {

using namespace emulator;

uint32_t cluster_rank() {
  return self().cta->rank;
}
uint32_t shared_address(const void* p) {
  const std::ptrdiff_t offset = static_cast<const unsigned char*>(p) - current->shared;
  if (offset < 0 || offset >= static_cast<std::ptrdiff_t>(machine.shape.shared))
    fail("asks for the shared address of something that is not in its shared memory");
  return (self().cta->rank + 1) << kOffsetBits | static_cast<uint32_t>(offset);
}
uint32_t cluster_address(uint32_t address, uint32_t rank) {
  (void)cta_at(address, "cluster_address");
  if (rank >= machine.shape.cluster) fail("asks for shared memory of a CTA beyond its cluster");
  return (rank + 1) << kOffsetBits | (address & kOffsetMask);
}

void st_async_v4(uint32_t cluster_address, uint4 v, uint32_t cluster_mbarrier) {
  Cta& target = cta_at(cluster_address, "st_async");
  if (&target != &cta_at(cluster_mbarrier, "st_async"))
    fail("st_async: data and mbarrier are in different CTAs");
  const uint32_t offset = offset_of(cluster_address, 16, "st_async");
  const uint32_t mbarrier = offset_of(cluster_mbarrier, 8, "st_async");
  check_running(target, "st_async");
  if (lost()) return;
  something_happened();
  ++machine.stats.async_stores;
  ++target.messages;
  machine.messages.push_back({&target, offset, mbarrier, v, nullptr, &target != self().cta});
}
void copy_multicast(uint32_t address, const void* from, uint32_t bytes, uint32_t mbarrier,
                    uint16_t ctas) {
  const char* const what = "copy_multicast";
  const uint32_t offset = address & kOffsetMask;
  if (bytes == 0 || bytes % 16 != 0 || offset % 16 != 0 || offset + bytes > machine.shape.shared)
    fail(std::string(what) + ": not aligned bytes within shared memory");
  if (reinterpret_cast<std::uintptr_t>(from) % 16 != 0)
    fail(std::string(what) + ": copies from " + hex(reinterpret_cast<std::uintptr_t>(from)));
  const uint32_t counter = offset_of(mbarrier, 8, what);
  if (ctas == 0 || ctas >> machine.shape.cluster != 0)
    fail(std::string(what) + ": goes to CTAs beyond its cluster");
  something_happened();
  for (uint32_t rank = 0; rank < machine.shape.cluster; ++rank) {
    if ((ctas >> rank & 1) == 0) continue;
    Cta& target = self().cta->rank_0[rank];
    check_running(target, what);
    ++machine.stats.copies;
    if (lost()) continue;
    const uint32_t* words = static_cast<const uint32_t*>(from);
    for (uint32_t at = 0; at < bytes; at += 16, words += 4) {
      ++target.messages;
      machine.messages.push_back({&target, offset + at, counter, {}, words, &target != self().cta});
    }
  }
}

void mbarrier_init(uint32_t address, uint32_t arrivals) {
  const uint32_t offset = offset_of(address, 8, "mbarrier_init");
  Cta& cta = *self().cta;
  if (&cta_at(address, "mbarrier_init") != &cta) fail("mbarrier_init: address of another CTA");
  Mbarrier* m = find_mbarrier(cta, offset);
  if (m == nullptr) m = &*cta.mbarriers.insert(cta.mbarriers.end(), Mbarrier{});
  *m = {offset, arrivals, arrivals};
}
void mbarrier_init_fence() {
  fence_mbarriers();
}
void mbarrier_arrive_expect_tx(uint32_t address, uint32_t bytes) {
  Mbarrier& m = own_mbarrier(address, "mbarrier_arrive_expect_tx");
  if (m.pending == 0) fail("arrives once too often at " + name_of_mbarrier(*self().cta, m.offset));
  deliver_ordered(self());
  count(*self().cta, m, 1, bytes);
}
void mbarrier_arrive_cluster(uint32_t cluster_mbarrier) {
  const char* const what = "mbarrier_arrive_cluster";
  Cta& target = cta_at(cluster_mbarrier, what);
  const uint32_t offset = offset_of(cluster_mbarrier, 8, what);
  check_running(target, what);
  Mbarrier* m = find_mbarrier(target, offset);
  if (m == nullptr || m->pending == 0 || (&target != self().cta && !m->fenced))
    fail(std::string(what) + ": " + name_of_mbarrier(target, offset) + " does not expect it");
  count(target, *m, 1, 0);
}
bool mbarrier_try_wait(uint32_t address, uint32_t parity, Where where) {
  Fiber& f = self();
  Mbarrier* m = &own_mbarrier(address, "mbarrier_try_wait");
  f.mbarrier = m->offset;
  f.parity = parity;
  f.mbarrier_missed = (m->phase & 1) == parity;
  if (f.mbarrier_missed) poll(Waits::kMbarrier, where);
  return !f.mbarrier_missed;
}

void cluster_arrive() {
  deliver_ordered(self());
  fence_mbarriers();
  arrive_at_cluster();
}
void cluster_arrive_relaxed() {
  arrive_at_cluster();
}
void cluster_wait(Where where) {
  Fiber& f = self();
  if (!f.arrived) fail("cluster_wait without a cluster_arrive before");
  if (f.generation == f.cta->cluster->generation) {
    f.waits = Waits::kCluster;
    f.where = where;
    block();
    f.waits = Waits::kNothing;
  }
  f.arrived = false;
}

}  // namespace rnnlm::ptx
