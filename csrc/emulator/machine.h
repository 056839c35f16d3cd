// The emulated device as launchers (launch.h) and tests (module.cpp) see it. One launch runs at a
// time: run() takes a lock for its length, and all else here takes the same one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "core/status.h"

namespace rnnlm {
struct LaunchShape;
}

namespace rnnlm::emulator {

// Shared addresses have 18 bits for the offset.
constexpr std::size_t kMaxShared = 1 << 18;

struct Settings {
  uint64_t seed = 1;       // of scheduling and of everything that is left to chance
  bool weak = true;        // delay relaxed and weak stores, and deliver them in any order
  uint32_t drop = 0;       // lose about one message in so many; 0: none
  uint32_t stale = 8;      // one word of so many that a copy reads late is an old one; 0: none
  uint64_t spins = 10000;  // polls of each thread without anything happening = a livelock
  int sms = 8;             // an SM holds one CTA
  int compute_capability = 90;
  std::size_t shared_per_block = 227 * 1024;
  bool cooperative = true;  // whether the device can launch so
  bool bounded = true;      // CTAs beyond the SMs start when others end; false: all at once
};

struct LaunchRecord {
  std::string name;  // launch()'s `doing`
  unsigned grid_x, grid_y, grid_z, threads;
  std::size_t shared;
  unsigned cluster;
  bool cooperative, programmatic;
  uint64_t waiting_ctas;  // that called wait_for_earlier_launches()
};

struct Stats {
  uint64_t launches = 0;  // that ran to their end
  uint64_t switches = 0;  // of threads
  uint64_t polls = 0;     // that found nothing
  uint64_t delayed_stores = 0;
  uint64_t async_stores = 0;
  uint64_t copies = 0;   // counted at each CTA that one goes to
  uint64_t stale = 0;    // words that a copy brought as they were before
  uint64_t dropped = 0;  // messages lost on purpose
};

Settings settings();
void configure(const Settings& settings);  // starts the random numbers of `seed` anew
std::vector<LaunchRecord> launch_log();
Stats stats();
void reset();  // default settings, empty log and statistics

// CTAs (clusters, where the shape has them) that `sms` SMs hold at once.
Status resident_limit(const LaunchShape& shape, int sms, int* limit);

// Runs call(argument) on every thread of the grid. Returns when all have ended or the launch cannot
// go on.
Status run(const char* doing, const LaunchShape& shape, void (*call)(const void*),
           const void* argument);

// An error as the CUDA runtime would report it.
Status cuda_error(const char* doing, const char* text, const char* name, const char* mend = "");

}  // namespace rnnlm::emulator
