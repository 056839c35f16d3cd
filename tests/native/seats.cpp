// Two threads that the system has put on one processor take their seats: the second must move to
// another processor, and both may run wherever they could before. Prints what went wrong.

#include <sched.h>

#include <cstdio>
#include <thread>

#include "cpu/parallel.h"

namespace {

cpu_set_t allowed() {
  cpu_set_t set;
  CPU_ZERO(&set);
  sched_getaffinity(0, sizeof set, &set);
  return set;
}

cpu_set_t only(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  return set;
}

int fail(const char* what) {
  std::puts(what);
  return 1;
}

}  // namespace

int main() {
  const cpu_set_t before = allowed();
  const int cpu = sched_getcpu();
  rnnlm::cpu::Seats seats;
  const cpu_set_t here = only(cpu);
  sched_setaffinity(0, sizeof here, &here);
  seats.take();

  int found = -1, alone = -1;
  cpu_set_t after, pinned;
  std::thread([&] {
    // Was started where the caller runs, and stays there until told otherwise.
    sched_setaffinity(0, sizeof before, &before);
    seats.take();
    found = sched_getcpu();
    after = allowed();
  }).join();
  std::thread([&] {
    // May run nowhere else: stays, and says nothing.
    seats.take();
    alone = sched_getcpu();
    pinned = allowed();
  }).join();

  if (found == cpu) return fail("the second thread stayed on the processor of the first");
  if (!CPU_EQUAL(&after, &before)) return fail("the second thread may not run where it could");
  if (alone != cpu || !CPU_EQUAL(&pinned, &here)) return fail("a thread left its only processor");
  return 0;
}
