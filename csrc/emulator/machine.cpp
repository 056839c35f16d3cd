// How the emulated device works.
//
// Threads. Every CUDA thread of a resident CTA is a fiber. The scheduler takes a random warp and
// resumes its lanes, in random order and one after another, for a random number of times; a lane
// runs until it waits (barrier, warp collective, cluster barrier), finds in a poll that it must go
// on waiting, or, now and then, loads. Now and then a whole CTA is frozen for a while, so that the
// others get as far ahead as the synchronisation lets them. CTAs beyond what the device holds start
// when others end.
//
// Global memory (memory.cpp) is real memory, and a plain store is there at once. Stores that other
// CTAs are to see before the launch ends (st_relaxed, st_weak) wait in the CTA's buffer, and a
// random one is delivered at a random moment; of one address the older one first. Each takes one of
// a few channels, of which now and then one delivers nothing for a while. A load finds, besides
// memory, what its thread has stored and what its CTA or warp has stored before a barrier. A
// release delivers just these stores first. Loads are never early: a missing acquire stays unseen.
//
// Shared memory (shared.cpp) is poisoned (NaN in every format) and lies between two fences of known
// bytes. The near ends of the fences are checked each time a thread has run, so that a store
// outside is blamed on the thread that did it; the rest at barriers and at the end. Shared
// addresses are numbers: rank in the cluster + 1, then 18 bits of offset. st.async messages are
// delivered at random moments; one that is under way to a CTA that has ended is an error. A copy
// from global memory is such messages of 16 bytes, for each CTA that it goes to, which are read as
// they arrive: by a proxy that now and then sees what was there before the last store.
//
// A launch cannot go on when no thread can run, or when all have polled for long without anything
// happening. Then, as at any error, its fibers are dropped and run() tells who waits for what
// (report.cpp). A kernel that loops without polling is not stopped.
//
// Time passes with each poll, and the faster the longer nothing has happened, so that waits with a
// time limit of seconds reach it before the emulator gives up.
#include "emulator/machine.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>

#include "emulator/state.h"

namespace rnnlm::emulator {

ThreadView* current = nullptr;
Index3 block_dim, grid_dim;
Machine machine;

namespace {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

std::mutex mutex;
std::vector<LaunchRecord> records;
StackPool stacks;
Context scheduler;
void (*call_kernel)(const void*);
const void* kernel_argument;
uint64_t waiting_ctas;
std::vector<std::size_t> free_slots;  // to fill after the turn

// --- start and end -------------------------------------------------------------------------------

unsigned clusters_on(int sms, const LaunchShape& shape) {
  return static_cast<unsigned>(sms) / shape.cluster;
}

Status check(const char* doing, const LaunchShape& shape) {
  const Settings& is = machine.settings;
  const uint64_t ctas = static_cast<uint64_t>(shape.grid_x) * shape.grid_y * shape.grid_z;
  if (shape.shared > is.shared_per_block)
    return cuda_error("reserving shared memory", "invalid argument", "cudaErrorInvalidValue");
  if (ctas == 0 || ctas >= 1u << 30 || shape.grid_y > 65535 || shape.grid_z > 65535 ||
      shape.threads == 0 || shape.threads > 1024) {
    return cuda_error(doing, "invalid configuration argument", "cudaErrorInvalidConfiguration");
  }
  if (shape.cluster == 0 || shape.cluster > 16 || shape.grid_x % shape.cluster != 0 ||
      (shape.cluster > 1 && is.compute_capability < 90) || clusters_on(is.sms, shape) == 0) {
    return cuda_error(doing, "a kernel launch error has occurred due to cluster misconfiguration",
                      "cudaErrorInvalidClusterSize");
  }
  if (!shape.cooperative) return Status::ok();
  if (!is.cooperative) return cuda_error(doing, "operation not supported", "cudaErrorNotSupported");
  if (ctas / shape.cluster > clusters_on(is.sms, shape)) {
    return cuda_error(doing, "too many blocks in cooperative launch",
                      "cudaErrorCooperativeLaunchTooLarge");
  }
  return Status::ok();
}

void start_cta(Cta& cta, unsigned index, std::size_t slot) {
  const LaunchShape& shape = machine.shape;
  deliver_first(cta, cta.stores.size());  // of the one that was here before
  cta = {};
  cta.index = index;
  cta.rank = index % shape.cluster;
  cta.cluster = &machine.clusters[slot / shape.cluster];
  cta.rank_0 = &cta - cta.rank;
  cta.alive = shape.threads;
  cta.fibers = &machine.fibers[slot * shape.threads];
  cta.warps = &machine.warps[slot * warps_per_cta()];
  place_shared(cta, slot);
  const Index3 block = {index % shape.grid_x, index / shape.grid_x % shape.grid_y,
                        index / shape.grid_x / shape.grid_y};
  for (unsigned w = 0; w < warps_per_cta(); ++w) {
    Warp& warp = cta.warps[w] = {};
    warp.cta = &cta;
    warp.lanes = cta.fibers + 32 * w;
    warp.exited = kAllLanes;
    for (unsigned t = 32 * w; t < std::min(32 * w + 32, shape.threads); ++t) {
      Fiber& fiber = cta.fibers[t] = {};
      fiber.thread = {t, 0, 0};
      fiber.block = block;
      fiber.shared = cta.shared;
      fiber.cta = &cta;
      fiber.warp = &warp;
      fiber.lane_bit = 1u << t % 32;
      warp.exited &= ~fiber.lane_bit;
    }
    wake(warp, ~warp.exited);
  }
}

void start_cluster(std::size_t slot) {
  const unsigned size = machine.shape.cluster, number = machine.to_start.back();
  machine.to_start.pop_back();
  machine.clusters[slot] = {};
  machine.clusters[slot].alive = size * machine.shape.threads;
  machine.live += size * machine.shape.threads;
  machine.started += size * machine.shape.threads;
  for (unsigned rank = 0; rank < size; ++rank)
    start_cta(machine.ctas[slot * size + rank], number * size + rank, slot * size + rank);
}

// The first function of every fiber. Nothing may be thrown across fibers.
void enter() noexcept {
  call_kernel(kernel_argument);
  self().finished = true;
  leave();
}

void end_cta(Cta& cta) {
  check_fences(cta, /*all=*/true);
  if (cta.messages != 0) {
    report("CTA " + std::to_string(cta.index) + " has ended while " + std::to_string(cta.messages) +
           " messages are under way to its shared memory: a cluster barrier must keep it");
  }
  waiting_ctas += cta.waits_for_earlier;
  if (cta.cluster->alive == 0)
    free_slots.push_back(static_cast<std::size_t>(cta.cluster - machine.clusters.data()));
}

void end_thread(Fiber& fiber) {
  Warp& warp = *fiber.warp;
  Cta& cta = *fiber.cta;
  Cluster& cluster = *cta.cluster;
  warp.exited |= fiber.lane_bit;
  warp.ready &= ~fiber.lane_bit;
  something_happened();
  --machine.live;
  --cta.alive;
  --cluster.alive;
  if (warp.arrived != 0) {
    return report(name_of(fiber) + " has ended while lanes of its warp wait for all 32 in " +
                  name_of(warp.kind));
  }
  if (fiber.arrived && fiber.generation == cluster.generation) --cluster.arrived;
  if (cta.at_barrier != 0 && cta.at_barrier == cta.alive) complete_barrier(cta);
  if (cluster.arrived != 0 && cluster.arrived == cluster.alive) complete_cluster(cluster);
  if (cta.alive == 0) end_cta(cta);
}

// --- scheduling ----------------------------------------------------------------------------------

void resume(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    fiber.stack = stacks.take();
    if (fiber.stack == nullptr) return report("no memory for the stack of another thread");
    fiber.context.prepare(fiber.stack, enter);
    fiber.cta->begun = true;
  }
  ++machine.stats.switches;
  current = &fiber;
  scheduler.switch_to(fiber.context);
  check_fences(*fiber.cta, /*all=*/false);
  current = nullptr;
  if (!fiber.finished) return;
  stacks.give(std::exchange(fiber.stack, nullptr));
  end_thread(fiber);
}

Warp& choose_warp() {
  Random& random = machine.random;
  const std::vector<Warp*>& runnable = machine.runnable;
  const uint64_t count = runnable.size();
  if (chance(4 * count)) {
    runnable[random.below(count)]->cta->frozen_until = machine.turns + random.below(8 * count);
  }
  if (chance(8 * count)) {
    machine.stalled_channel = random.below(4);
    machine.stalled_until = machine.turns + random.below(32 * count);
  }
  ++machine.turns;
  Warp* warp = runnable[random.below(count)];
  for (int i = 0; i < 16 && warp->cta->frozen_until > machine.turns; ++i)
    warp = runnable[random.below(count)];
  return *warp;
}

void unlist(Warp& warp) {
  std::vector<Warp*>& runnable = machine.runnable;
  runnable.back()->listed = warp.listed;
  runnable[static_cast<std::size_t>(warp.listed)] = runnable.back();
  runnable.pop_back();
  warp.listed = -1;
}

void take_turn(Warp& warp) {
  uint32_t budget = 1 + machine.random.below(chance(4) ? 4 : 96);
  while (budget-- != 0 && warp.ready != 0) {
    const uint32_t first = machine.random.below(32);
    const uint32_t rotated = warp.ready >> first | warp.ready << (32 - first) % 32;
    resume(warp.lanes[(static_cast<uint32_t>(__builtin_ctz(rotated)) + first) % 32]);
    deliver_some_stores();
    deliver_some_messages();
    if (!machine.error.empty()) return;
  }
  warp.ready |= std::exchange(warp.paused, 0);
  if (warp.ready == 0) unlist(warp);
  for (const std::size_t slot : free_slots)
    if (!machine.to_start.empty()) start_cluster(slot);
  free_slots.clear();
}

void run_threads() {
  const uint64_t spins = machine.settings.spins;
  while (machine.live != 0 && machine.error.empty()) {
    if (machine.runnable.empty()) {
      report("no thread can go on. " + everybody());
    } else if (machine.quiet > spins * machine.live ||
               machine.polls > 20 * spins * machine.started) {
      report("the threads poll and nothing happens. " + everybody());
    } else {
      take_turn(choose_warp());
    }
  }
}

}  // namespace

void wake(Warp& warp, uint32_t lanes) {
  warp.ready |= lanes;
  if (warp.ready == 0 || warp.listed >= 0) return;
  warp.listed = static_cast<int>(machine.runnable.size());
  machine.runnable.push_back(&warp);
}

void leave() {
  self().context.switch_to(scheduler);
}

void block() {
  self().warp->ready &= ~self().lane_bit;
  leave();
}

void poll(Waits waits, Where where) {
  Fiber& f = self();
  f.waits = waits;
  f.where = where;
  f.loads = 0;
  ++machine.polls;
  ++machine.quiet;
  const double threads = static_cast<double>(machine.live);
  const double quiet = static_cast<double>(machine.quiet) / threads;
  machine.time += (20 + quiet * quiet / 4) / threads;
  f.warp->paused |= f.lane_bit;
  block();
  f.waits = Waits::kNothing;
}

// --- the host's side -----------------------------------------------------------------------------

Status run(const char* doing, const LaunchShape& shape, void (*call)(const void*),
           const void* argument) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Status checked = check(doing, shape);
  if (!checked.is_ok()) return checked;
  const std::size_t all = std::size_t{shape.grid_x} * shape.grid_y * shape.grid_z / shape.cluster;
  std::size_t slots = all;
  if (machine.settings.bounded)
    slots = std::min<std::size_t>(slots, clusters_on(machine.settings.sms, shape));
  const std::size_t ctas = slots * shape.cluster;
  if (!reserve_shared(shape.shared, ctas))
    return Status::out_of_memory("The emulator has no memory for that many CTAs at once");

  call_kernel = call;
  kernel_argument = argument;
  waiting_ctas = 0;
  block_dim = {shape.threads, 1, 1};
  grid_dim = {shape.grid_x, shape.grid_y, shape.grid_z};
  machine.shape = shape;
  machine.error.clear();
  machine.ctas.assign(ctas, {});
  machine.clusters.assign(slots, {});
  machine.fibers.assign(ctas * shape.threads, {});
  machine.warps.assign(ctas * warps_per_cta(), {});
  machine.runnable.clear();
  machine.started = machine.live = machine.turns = machine.polls = machine.quiet = 0;
  machine.stalled_until = 0;
  machine.to_start.resize(all);
  for (unsigned i = 0; i < all; ++i) {
    machine.to_start[i] = i;
    std::swap(machine.to_start[i], machine.to_start[machine.random.below(i + 1)]);
  }
  for (std::size_t slot = 0; slot < slots; ++slot) start_cluster(slot);

  run_threads();

  for (Fiber& fiber : machine.fibers)
    if (fiber.stack != nullptr) stacks.give(fiber.stack);
  for (Cta& cta : machine.ctas) deliver_first(cta, cta.stores.size());
  machine.messages.clear();
  machine.overwritten = {};
  free_slots.clear();
  machine.stats.polls += machine.polls;
  records.push_back({doing, shape.grid_x, shape.grid_y, shape.grid_z, shape.threads, shape.shared,
                     shape.cluster, shape.cooperative, shape.programmatic, waiting_ctas});
  if (!machine.error.empty()) {
    return Status::device_error(std::string("CUDA error while ") + doing +
                                ": emulator: " + machine.error);
  }
  ++machine.stats.launches;
  return Status::ok();
}

Status resident_limit(const LaunchShape& shape, int sms, int* limit) {
  if (shape.shared > settings().shared_per_block)
    return cuda_error("reserving shared memory", "invalid argument", "cudaErrorInvalidValue");
  *limit = static_cast<int>(clusters_on(sms, shape));
  return Status::ok();
}

Status cuda_error(const char* doing, const char* text, const char* name, const char* mend) {
  std::string cause = std::string("CUDA error while ") + doing + ": " + text + " (" + name + ")";
  // As is_refusal() of launch/cuda_status.h.
  for (const char* refusal : {"cudaErrorCooperativeLaunchTooLarge", "cudaErrorInvalidClusterSize",
                              "cudaErrorNotSupported"}) {
    if (std::strcmp(name, refusal) == 0) return Status::unsupported(std::move(cause), mend);
  }
  return Status::device_error(std::move(cause), mend);
}

Settings settings() {
  const std::lock_guard<std::mutex> lock(mutex);
  return machine.settings;
}
void configure(const Settings& settings) {
  const std::lock_guard<std::mutex> lock(mutex);
  machine.settings = settings;
  machine.random.seed(settings.seed);
}
std::vector<LaunchRecord> launch_log() {
  const std::lock_guard<std::mutex> lock(mutex);
  return records;
}
Stats stats() {
  const std::lock_guard<std::mutex> lock(mutex);
  return machine.stats;
}
void reset() {
  configure({});
  const std::lock_guard<std::mutex> lock(mutex);
  records.clear();
  machine.stats = {};
}

}  // namespace rnnlm::emulator
