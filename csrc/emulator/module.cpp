// The Python module rnnlm_kernels._emulated: what _C has for GPUs, run by the emulator on host
// memory, and the emulator's switches. For tests; wheels do not contain it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>

#include "emulator/machine.h"
#include "emulator/selftest.h"
#include "launch/probe.h"
#include "python/cuda.h"
#include "python/errors.h"

namespace py = pybind11;

namespace rnnlm::emulator {
namespace {

// Calls visit(name, member) for each setting.
template <class Visitor>
void for_each_setting(Settings& s, const Visitor& visit) {
  visit("seed", s.seed);
  visit("weak", s.weak);
  visit("drop", s.drop);
  visit("stale", s.stale);
  visit("spins", s.spins);
  visit("sms", s.sms);
  visit("compute_capability", s.compute_capability);
  visit("shared_per_block", s.shared_per_block);
  visit("cooperative", s.cooperative);
  visit("bounded", s.bounded);
}

py::dict emulator_configure(const py::kwargs& changes) {
  Settings wanted = settings();
  std::size_t known = 0;
  for_each_setting(wanted, [&](const char* name, auto& member) {
    if (!changes.contains(name)) return;
    ++known;
    member = changes[name].cast<std::decay_t<decltype(member)>>();
  });
  if (known != changes.size())
    throw py::type_error("emulator_configure() has no such setting; call it without arguments");
  if (wanted.sms < 1 || wanted.spins < 1 || wanted.shared_per_block > kMaxShared) {
    throw py::value_error("sms and spins are 1 or more, shared_per_block at most " +
                          std::to_string(kMaxShared));
  }
  if (known != 0) configure(wanted);
  py::dict now;
  for_each_setting(wanted, [&](const char* name, auto& member) { now[name] = member; });
  return now;
}

py::list emulator_log() {
  py::list log;
  for (const LaunchRecord& launch : launch_log()) {
    py::dict one;
    one["name"] = launch.name;
    one["grid"] = py::make_tuple(launch.grid_x, launch.grid_y, launch.grid_z);
    one["threads"] = launch.threads;
    one["shared"] = launch.shared;
    one["cluster"] = launch.cluster;
    one["cooperative"] = launch.cooperative;
    one["programmatic"] = launch.programmatic;
    one["waiting_ctas"] = launch.waiting_ctas;
    log.append(one);
  }
  return log;
}

py::dict emulator_stats() {
  const Stats s = stats();
  py::dict all;
  all["launches"] = s.launches;
  all["switches"] = s.switches;
  all["polls"] = s.polls;
  all["delayed_stores"] = s.delayed_stores;
  all["async_stores"] = s.async_stores;
  all["copies"] = s.copies;
  all["stale"] = s.stale;
  all["dropped"] = s.dropped;
  return all;
}

void selftest(const std::string& name, std::uintptr_t in, std::uintptr_t out,
              std::uintptr_t scratch, int n) {
  raise_unless_ok(launch_selftest(
      name, {reinterpret_cast<const uint32_t*>(in), reinterpret_cast<uint32_t*>(out),
             reinterpret_cast<uint32_t*>(scratch), n, 0}));
}

void cuda_probe(std::uintptr_t x_ptr, std::uintptr_t y_ptr, std::int64_t n, float a, int device,
                std::uintptr_t stream) {
  raise_unless_ok(launch_probe({reinterpret_cast<const float*>(x_ptr),
                                reinterpret_cast<float*>(y_ptr), n, a, device, stream}));
}

}  // namespace
}  // namespace rnnlm::emulator

PYBIND11_MODULE(_emulated, m) {
  using namespace rnnlm::emulator;
  m.doc() = "The CUDA kernels of rnnlm_kernels on an emulated device. For tests.";

  rnnlm::bind_cuda(m);
  rnnlm::bind_plan(m);
  m.def("cuda_probe", &cuda_probe, py::arg("x_ptr"), py::arg("y_ptr"), py::arg("n"), py::arg("a"),
        py::kw_only(), py::arg("device") = 0, py::arg("stream") = 0,
        "y = a*x + y, as _C.cuda_probe.");

  m.def("emulator_configure", &emulator_configure,
        "Changes the settings given by name and returns all, as a dict. Any change starts the "
        "random numbers anew.\n\n"
        "seed: of scheduling and all else left to chance. weak: delay relaxed and weak stores. "
        "drop: lose about one message in so many, 0: none. stale: of so many words that a copy "
        "from global memory reads late, about one is what was there before, 0: none. spins: polls "
        "of each thread without "
        "anything happening that make a livelock. sms, compute_capability, shared_per_block, "
        "cooperative: the device. bounded: CTAs beyond sms start when others end; False: all at "
        "once.");
  m.def("emulator_reset", &reset, "Default settings, empty log and statistics.");
  m.def("emulator_log", &emulator_log,
        "The launches that were started, oldest first, as dicts: name, grid, threads, shared, "
        "cluster, cooperative, programmatic, waiting_ctas (how many CTAs waited for earlier "
        "launches).");
  m.def("emulator_stats", &emulator_stats,
        "Counts since the last reset: launches that ended well, switches between threads, polls "
        "that found nothing, delayed_stores, async_stores, copies into shared memory, stale words "
        "that these brought, dropped messages.");
  m.def("selftest", &selftest, py::arg("name"), py::arg("input") = 0, py::arg("output") = 0,
        py::arg("scratch") = 0, py::arg("n") = 0,
        "Launches a small kernel that tests the emulator (csrc/emulator/selftest.cpp). input, "
        "output and scratch are addresses of 32-bit words.");
  m.def("selftest_names", &selftest_names, "The names that selftest() knows.");
}
