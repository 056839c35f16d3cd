#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__APPLE__)
#include <mach-o/dyld.h>
#else
#include <link.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rnnlm::cpu {
namespace {

// --- the OpenMP runtime of this process ----------------------------------------------------------
// GNU's entry points, which LLVM's and Intel's runtimes offer as well.

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  std::string name = "std::thread";
  explicit operator bool() const { return parallel && thread_num && num_threads; }
};

bool looks_like_openmp(const char* path) {
  const std::string name = path ? path : "";
  const std::string base = name.substr(name.rfind('/') + 1);
  return base.rfind("libgomp", 0) == 0 || base.rfind("libiomp5", 0) == 0 ||
         base.rfind("libomp", 0) == 0;
}

void bind(OpenMP& omp, const char* path) {
  void* handle = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  if (!handle) return;
  OpenMP found;
  found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(handle, "GOMP_parallel"));
  found.thread_num =
      reinterpret_cast<decltype(found.thread_num)>(dlsym(handle, "omp_get_thread_num"));
  found.num_threads =
      reinterpret_cast<decltype(found.num_threads)>(dlsym(handle, "omp_get_num_threads"));
  const std::string full = path;
  found.name = full.substr(full.rfind('/') + 1);
  if (found) omp = found;
}

// Takes a library's runtime, if it has one; true where there is no need to look further. Several
// may be loaded (torch's own and the system's): torch's wheel carries its own under torch/lib or
// torch.libs, and that is the pool that runs torch's kernels.
bool consider(OpenMP& omp, const char* path) {
  if (!looks_like_openmp(path)) return false;
  bind(omp, path);
  return omp && std::string(path).find("torch") != std::string::npos;
}

// Looked up once, at the first call: torch is imported before any tensor exists.
const OpenMP& openmp() {
  static const OpenMP found = [] {
    OpenMP omp;
#if defined(__APPLE__)
    for (uint32_t i = 0; i < _dyld_image_count(); ++i)
      if (consider(omp, _dyld_get_image_name(i))) break;
#else
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* context) {
          return int(consider(*static_cast<OpenMP*>(context), info->dlpi_name));
        },
        &omp);
#endif
    return omp;
  }();
  return found;
}

// A forked child has none of its parent's threads, and GNU's runtime waits for them for ever.
bool in_forked_child = false;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One call of a team.
struct Call {
  Body body;
  void* context;
  bool awake;  // Threads that have just worked still look for work, each on its processor.
  Seats seats{};
  std::atomic<int> came{0};  // besides the caller

  void enter(int thread, int threads) {
    if (thread > 0) {
      came.fetch_add(1, std::memory_order_relaxed);
      seats.take();
    } else if (!awake) {
      // Who was woken on this processor cannot leave it before it has had a turn.
      for (int spins = 0; came.load(std::memory_order_relaxed) < threads - 1; ++spins) {
        if (spins == 64) {
          std::this_thread::yield();
          break;
        }
        pause();
      }
    }
    body(context, thread, threads);
  }
};

void enter_team(void* data) {
  const OpenMP& omp = openmp();
  static_cast<Call*>(data)->enter(omp.thread_num(), omp.num_threads());
}

// Without OpenMP: threads for this one call. Costs tens of microseconds, and is always right.
void spawn_team(int threads, Call& call) {
  // The team's size must be known before any member starts, so each waits for the verdict.
  struct Gate {
    std::atomic<int> size{0};
  };
  Gate gate;
  std::vector<std::thread> team;
  try {
    for (int i = 1; i < threads; ++i) {
      team.emplace_back([&gate, &call, i] {
        int size;
        while (!(size = gate.size.load(std::memory_order_acquire))) std::this_thread::yield();
        call.enter(i, size);
      });
    }
  } catch (const std::system_error&) {
    // The system is out of threads: go on with those there are.
  }
  const int size = int(team.size()) + 1;
  gate.size.store(size, std::memory_order_release);
  call.enter(0, size);
  for (std::thread& thread : team) thread.join();
}

// Spins. A core may be taken away by another process: after some microseconds let it run.
template <class Condition>
void wait_until(Condition condition) {
  for (int spins = 0; !condition(); ++spins) {
    if (spins < 4096) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace

void parallel(int threads, Body body, void* context) {
  if (threads <= 1) return body(context, 0, 1);
  static const int watch_forks = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
  static_cast<void>(watch_forks);
  using Clock = std::chrono::steady_clock;
  static thread_local Clock::time_point last;
  Call call{body, context, Clock::now() - last < std::chrono::microseconds(200)};
  call.seats.take();
  if (openmp() && !in_forked_child) {
    openmp().parallel(enter_team, &call, unsigned(threads), 0);
  } else {
    spawn_team(threads, call);
  }
  last = Clock::now();
}

bool side_by_side(int threads, const Demand& first, const Demand& second) {
  const int half = threads / 2;
  const auto half_will_do = [half](const Demand& d) {
    return d.threads <= half || d.caches <= half;
  };
  return half > 0 && half_will_do(first) && half_will_do(second) &&
         std::min(first.work, second.work) >= kThreadWork;
}

int layers_at_once(int threads, int layers, int64_t steps, const Demand& most) {
  // A call of one thread is not made one of two, which the system may keep waiting, for little.
  if (most.work < 10 * kThreadWork) return 1;
  for (int crews = std::min(threads, layers); crews > 1; --crews) {
    const int crew = threads / crews;
    const int64_t lag = (crews - 1) * kStepsBehind;
    // Threads that a layer has no use for cost nothing. Where it has, but can do with fewer, it is
    // slower by itself: then nobody may be idle for long.
    if (most.threads <= crew
            ? steps >= 8 * lag
            : most.caches_with_input <= crew && layers % crews == 0 && steps >= 32 * lag)
      return crews;
  }
  return 1;
}

bool is_amd() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

void divide(int came, const int* asked, int count, Crew* crews) {
  if (came < count) {
    for (int i = 0; i < count; ++i) crews[i] = {i % came, 1};
    return;
  }
  int begin = 0, wanted = std::accumulate(asked, asked + count, 0);
  for (int i = 0; i < count; ++i) {
    const int left = came - begin, others = count - 1 - i;
    int size = asked[i];
    if (left < wanted) size = std::max(1, std::min(left - others, left * size / wanted));
    crews[i] = {begin, size};
    begin += size;
    wanted -= asked[i];
  }
}

int64_t most_rows_of_group(int64_t batch, int groups) {
  return std::min(batch, 2 * ((batch + groups - 1) / groups));
}

Rows rows_of_group(const int64_t* batch_sizes, int64_t steps, int64_t batch, int group,
                   int groups) {
  const int64_t most = most_rows_of_group(batch, groups);
  Rows rows{0, 0};
  int64_t length = steps;  // of row rows.end
  int64_t rest = std::accumulate(batch_sizes, batch_sizes + steps, int64_t{0}), own = 0;
  for (int others = groups - 1; others >= groups - 1 - group; --others) {
    const int64_t least = batch - others * most;  // or the others could not have the rest
    const int64_t limit = std::min(rows.end + most, batch - others);
    rows.begin = rows.end;
    rest -= own;
    own = 0;
    for (; rows.end < limit; ++rows.end, own += length) {
      while (length > 0 && batch_sizes[length - 1] <= rows.end) --length;
      // With half of the next row it would have its share of the rest: it is as near as it gets.
      const bool enough = (2 * own + length) * (others + 1) > 2 * rest;
      if (enough && rows.end > rows.begin && rows.end >= least) break;
    }
  }
  return rows;
}

void map_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes,
               [[maybe_unused]] int part, [[maybe_unused]] int parts) {
#if defined(MADV_POPULATE_WRITE)
  constexpr int64_t kSmall = int64_t(2) << 20;
  constexpr uintptr_t kPage = 4096;
  if (!memory || bytes < kSmall) return;
  const auto first = reinterpret_cast<uintptr_t>(memory);
  const auto boundary = [&](int i) {
    return (first + uintptr_t(bytes) / uintptr_t(parts) * uintptr_t(i) + kPage - 1) / kPage * kPage;
  };
  const uintptr_t begin = boundary(part);
  const uintptr_t end =
      part + 1 < parts ? boundary(part + 1) : (first + uintptr_t(bytes)) / kPage * kPage;
  // What malloc has had before is there, and asking for it would cost time: some pages tell.
  constexpr uintptr_t kProbes = 4;
  const uintptr_t pages = begin < end ? (end - begin) / kPage : 0;
  for (uintptr_t i = 0; i < kProbes && i < pages; ++i) {
    void* page = reinterpret_cast<void*>(begin + pages * (2 * i + 1) / (2 * kProbes) * kPage);
    unsigned char there = 1;
    if (mincore(page, kPage, &there) == 0 && !(there & 1)) {
      madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_WRITE);
      return;
    }
  }
#endif
}

void Seats::take() {
#if defined(__linux__)
  if (claim(sched_getcpu())) return;
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  cpu_set_t vacant = allowed;
  for (int cpu = 0; cpu < kMost; ++cpu)
    if (taken_[cpu / 64].load(std::memory_order_relaxed) >> cpu % 64 & 1) CPU_CLR(cpu, &vacant);
  if (CPU_COUNT(&vacant) == 0 || sched_setaffinity(0, sizeof vacant, &vacant) != 0) return;
  claim(sched_getcpu());
  sched_setaffinity(0, sizeof allowed, &allowed);
#endif
}

bool Seats::claim(int cpu) {
  if (cpu < 0 || cpu >= kMost) return true;
  const uint64_t bit = uint64_t(1) << cpu % 64;
  return !(taken_[cpu / 64].fetch_or(bit, std::memory_order_relaxed) & bit);
}

const char* parallel_runtime() {
  return openmp().name.c_str();
}

void Barrier::wait(int participants) {
  if (participants <= 1) return;
  const int phase = __atomic_load_n(&phase_, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == participants) {
    __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&phase_, phase + 1, __ATOMIC_RELEASE);
    return;
  }
  wait_until([&] { return __atomic_load_n(&phase_, __ATOMIC_ACQUIRE) != phase; });
}

Handout::Piece Handout::take(int64_t end, int64_t most, int64_t unit, int threads) {
  int64_t begin = __atomic_load_n(&next_, __ATOMIC_RELAXED);
  for (;;) {
    if (begin >= end) return {end, end};
    const int64_t share = (end - begin + threads - 1) / threads;
    const int64_t piece = (std::min(most, share) + unit - 1) / unit * unit;
    const int64_t after = std::min(end, begin + piece);
    if (__atomic_compare_exchange_n(&next_, &begin, after, true, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED))
      return {begin, after};
  }
}

void Progress::publish(int64_t iterations) {
  __atomic_store_n(&iterations_, iterations, __ATOMIC_RELEASE);
}

void Progress::await(int64_t iterations) const {
  wait_until([&] { return __atomic_load_n(&iterations_, __ATOMIC_ACQUIRE) >= iterations; });
}

namespace {
struct Scratch {
  void* data = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(data); }
};
}  // namespace

void* workspace(size_t bytes) {
  thread_local Scratch scratch;
  constexpr size_t kKeep = size_t(64) << 20;  // more than this is given back at the next call
  if (scratch.size < bytes || scratch.size > kKeep) {
    std::free(scratch.data);
    scratch.size = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    scratch.data = std::aligned_alloc(4096, rounded);
    if (!scratch.data) return nullptr;
    scratch.size = rounded;
  }
  return scratch.data;
}

}  // namespace rnnlm::cpu
