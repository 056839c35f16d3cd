// What the emulator says when a launch cannot go on. See machine.cpp.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emulator/state.h"

namespace rnnlm::emulator {
namespace {

// Completes "CTA 0 thread 0 waits for".
std::string awaited(const Fiber& f) {
  const Cta& cta = *f.cta;
  switch (f.waits) {
    case Waits::kBarrier:
      return "__syncthreads at " + place(f.where) + ", where " + std::to_string(cta.at_barrier) +
             " of " + std::to_string(cta.alive) + " threads are";
    case Waits::kCollective:
      return std::string(name_of(f.warp->kind)) + " at " + place(f.where) + ", where " +
             std::to_string(__builtin_popcount(f.warp->arrived)) + " of 32 lanes are";
    case Waits::kCluster:
      return "cluster_wait at " + place(f.where) + ", " + std::to_string(cta.cluster->arrived) +
             " of " + std::to_string(cta.cluster->alive) + " threads have arrived";
    case Waits::kMbarrier: {
      std::string text = "the mbarrier at byte " + std::to_string(f.mbarrier) + ", parity " +
                         std::to_string(f.parity) + ", at " + place(f.where);
      for (const Mbarrier& m : cta.mbarriers) {
        if (m.offset != f.mbarrier) continue;
        text += ", which is in phase " + std::to_string(m.phase) + " and misses " +
                std::to_string(m.pending) + " arrivals and " + std::to_string(m.bytes) + " bytes";
      }
      return text;
    }
    case Waits::kPoll: {
      std::string text = "a poll at " + place(f.where);
      if (f.loaded_from == nullptr) return text;
      return text + "; last loaded " + hex(*f.loaded_from) + " from address " +
             hex(reinterpret_cast<std::uintptr_t>(f.loaded_from)) + " at " + place(f.loaded_where);
    }
    case Waits::kNothing:
      break;
  }
  return f.stack == nullptr ? "its first turn" : "its turn";
}

// Threads of a CTA that wait for the same.
struct Group {
  unsigned cta;
  std::string awaited, threads;
  unsigned count;
};

}  // namespace

void report(const std::string& what) {
  if (machine.error.empty()) machine.error = what;
}

void fail(const std::string& what) {
  report(name_of(self()) + " " + what);
  leave();
  std::abort();  // nobody resumes it
}

std::string name_of(const Fiber& fiber) {
  return "CTA " + std::to_string(fiber.cta->index) + " thread " + std::to_string(fiber.thread.x);
}

const char* name_of(Collective kind) {
  constexpr const char* kNames[] = {"warp_sync", "warp_any", "shuffle", "shuffle_xor",
                                    "mma_bf16",  "mma_f16",  "mma_tf32"};
  return kNames[static_cast<int>(kind)];
}

std::string place(const Where& where) {
  const char* slash = std::strrchr(where.file, '/');
  return std::string(slash != nullptr ? slash + 1 : where.file) + ":" + std::to_string(where.line);
}

std::string hex(uint64_t value) {
  char text[20];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

// "CTA 0 threads 0, 1, 2, 3 and 28 more wait for ...; CTA 1 thread 5 waits for ..."
std::string everybody() {
  constexpr std::size_t kMostGroups = 12;
  constexpr unsigned kMostThreads = 4;
  std::vector<Group> groups;
  bool complete = true;
  for (const Fiber& f : machine.fibers) {
    if (f.finished) continue;
    const std::string what = awaited(f);
    auto group = std::find_if(groups.begin(), groups.end(), [&](const Group& g) {
      return g.cta == f.cta->index && g.awaited == what;
    });
    if (group == groups.end()) {
      complete = groups.size() < kMostGroups;
      if (!complete) break;
      group = groups.insert(group, {f.cta->index, what, "", 0});
    }
    if (++group->count <= kMostThreads)
      group->threads += (group->count > 1 ? ", " : "") + std::to_string(f.thread.x);
  }
  std::string text;
  for (const Group& g : groups) {
    text += (text.empty() ? "CTA " : "; CTA ") + std::to_string(g.cta) +
            (g.count > 1 ? " threads " : " thread ") + g.threads;
    if (g.count > kMostThreads) text += " and " + std::to_string(g.count - kMostThreads) + " more";
    text += (g.count > 1 ? " wait for " : " waits for ") + g.awaited;
  }
  if (!complete) text += "; and others";
  if (!machine.to_start.empty()) {
    text += ". " + std::to_string(machine.to_start.size() * machine.shape.cluster) +
            " CTAs of the grid have not started: the device holds " +
            std::to_string(machine.ctas.size()) + " at once";
  }
  return text;
}

}  // namespace rnnlm::emulator
