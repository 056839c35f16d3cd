// What the files of the emulator share while a launch runs. machine.cpp tells how it all works.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/machine.h"
#include "emulator/ptx.h"
#include "launch/launch.h"

namespace rnnlm::emulator {

enum class Waits { kNothing, kBarrier, kCollective, kCluster, kMbarrier, kPoll };

struct Cta;
struct Warp;

// A CUDA thread.
struct Fiber : ThreadView {
  Context context;
  char* stack = nullptr;  // null before it has run, and after
  bool finished = false;
  Warp* warp = nullptr;
  Cta* cta = nullptr;
  uint32_t lane_bit = 0;
  Waits waits = Waits::kNothing;
  Where where;                            // it waits there
  uint32_t mbarrier = 0, parity = 0;      // of its last mbarrier_try_wait
  bool mbarrier_missed = false;           // that found nothing, and nothing was loaded since
  const uint32_t* loaded_from = nullptr;  // last load
  Where loaded_where;
  unsigned loads = 0;    // since the last pause
  bool arrived = false;  // at the cluster barrier's phase `generation`, and not gone on yet
  unsigned generation = 0;
};

// What all 32 lanes of a warp do together.
enum class Collective { kSync, kAny, kShuffle, kShuffleXor, kMmaBf16, kMmaF16, kMmaTf32 };

// What a lane brings to it and takes from it.
struct LaneData {
  uint64_t value = 0;
  int selector = 0;
  float* d = nullptr;
  const uint32_t* a = nullptr;
  const uint32_t* b = nullptr;
};

struct Warp {
  Cta* cta = nullptr;
  Fiber* lanes = nullptr;
  int listed = -1;                 // index in Machine::runnable
  uint32_t ready = 0, paused = 0;  // paused: not before the warp's next turn
  uint32_t exited = 0, at_barrier = 0;
  uint32_t arrived = 0;  // at the collective `kind`
  Collective kind = Collective::kSync;
  std::array<LaneData*, 32> data{};
  uint32_t epoch = 0;  // counts warp_sync
};

// A store under way. What `epoch` and `warp_epoch` are at is seen by the whole CTA or warp.
struct Store {
  uint32_t* p;
  uint32_t value, thread, epoch, warp_epoch, channel;
};

// Of an st.async or of a copy under way: 16 bytes.
struct Message {
  Cta* target;
  uint32_t offset, mbarrier;
  uint4 words;
  const uint32_t* from;  // of a copy: read as it arrives; null for an st.async
  bool from_other_cta;
};

// What a word of global memory was before the store that was delivered last.
struct Overwritten {
  const uint32_t* p;
  uint32_t value;
};

struct Mbarrier {
  uint32_t offset;
  uint32_t expected, pending;  // arrivals
  int64_t bytes = 0;           // still to come
  uint32_t phase = 0;
  bool fenced = false;  // the cluster may know of it
};

struct Cluster {
  unsigned alive = 0, arrived = 0, generation = 0;
};

struct Cta {
  unsigned index = 0, rank = 0;
  Cluster* cluster = nullptr;
  Cta* rank_0 = nullptr;
  Fiber* fibers = nullptr;
  Warp* warps = nullptr;
  unsigned char* shared = nullptr;
  unsigned alive = 0, at_barrier = 0;
  Where barrier;  // at which they are
  uint32_t barrier_thread = 0;
  uint32_t epoch = 0;  // counts __syncthreads
  bool begun = false, waits_for_earlier = false;
  uint64_t frozen_until = 0;
  unsigned messages = 0;  // under way to it
  std::vector<Mbarrier> mbarriers;
  std::vector<Store> stores;
  std::array<uint16_t, 1024> stores_to{};  // how many of them go to addresses of this hash
  int dirty = -1;                          // index in Machine::dirty
};

// splitmix64
class Random {
 public:
  void seed(uint64_t seed) { state_ = seed * 0x9E3779B97F4A7C15u; }
  uint32_t below(std::size_t n) { return static_cast<uint32_t>((next() >> 32) * n >> 32); }

 private:
  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  uint64_t state_ = 0;
};

struct Machine {
  Settings settings;
  Stats stats;
  Random random;

  LaunchShape shape;
  std::string error;              // the first of the launch
  std::vector<Cta> ctas;          // resident ones, [slot][rank]
  std::vector<Cluster> clusters;  // [slot]
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned> to_start;  // numbers of clusters; those at the back first
  std::vector<Warp*> runnable;
  uint64_t started = 0, live = 0;  // threads
  uint64_t turns = 0;
  uint64_t polls = 0, quiet = 0;  // all; and those since something happened
  double time = 1e6;              // nanoseconds

  std::vector<Cta*> dirty;  // that have stores under way
  uint64_t stalled_until = 0;
  uint32_t stalled_channel = 0;
  std::vector<Message> messages;
  std::array<Overwritten, 256> overwritten;  // by the last stores, in a ring
  std::size_t next_overwritten;
};

extern Machine machine;

inline Fiber& self() {
  return *static_cast<Fiber*>(current);
}
inline bool chance(std::size_t one_in) {
  return machine.random.below(one_in) == 0;
}
inline void something_happened() {
  machine.quiet = 0;
}

// --- machine.cpp ---------------------------------------------------------------------------------

void leave();                         // lets the scheduler run; the thread stays ready
void block();                         // the same, until somebody wakes it
void poll(Waits waits, Where where);  // the same, until others had their turn
void wake(Warp& warp, uint32_t lanes);

inline unsigned warps_per_cta() {
  return (machine.shape.threads + 31) / 32;
}

// --- collectives.cpp -----------------------------------------------------------------------------

void complete_barrier(Cta& cta);

// --- memory.cpp ----------------------------------------------------------------------------------

bool lost();                                   // whether to lose this message
uint32_t load_for_copy(const uint32_t* word);  // perhaps what was there before
void deliver_some_stores();
void deliver_first(Cta& cta, std::size_t count);
void deliver_ordered(Fiber& fiber);  // what a release of this thread puts in front of itself

// --- shared.cpp ----------------------------------------------------------------------------------

bool reserve_shared(std::size_t bytes, std::size_t ctas);
void place_shared(Cta& cta, std::size_t slot);  // sets cta.shared and fills it and its fences
void check_fences(const Cta& cta, bool all);    // reports what was written there
void deliver_some_messages();
void complete_cluster(Cluster& cluster);

// --- report.cpp ----------------------------------------------------------------------------------

void report(const std::string& what);             // ends the launch; the first report is kept
[[noreturn]] void fail(const std::string& what);  // report() with the current thread in front
std::string name_of(const Fiber& fiber);
const char* name_of(Collective kind);
std::string place(const Where& where);  // file:line
std::string hex(uint64_t value);
std::string everybody();  // who waits for what

}  // namespace rnnlm::emulator
