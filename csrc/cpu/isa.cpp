#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels.h"

namespace rnnlm::cpu {
namespace {

struct Candidate {
  const char* name;
  bool runs_here;
  Kernels (*kernels)();
};

Choice pick() {
  // Best first.
  const Candidate candidates[] = {
#if defined(RNNLM_HAVE_AVX512)
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
       avx512::kernels},
#endif
#if defined(RNNLM_HAVE_AVX2)
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), avx2::kernels},
#endif
      {"generic", true, generic::kernels},
  };
  const char* wanted = std::getenv("RNNLM_CPU_ISA");
  const bool free_choice = !wanted || !*wanted || std::strcmp(wanted, "auto") == 0;
  std::string able;
  for (const Candidate& candidate : candidates) {
    if (!candidate.runs_here) continue;
    if (free_choice || std::strcmp(wanted, candidate.name) == 0)
      return {candidate.kernels(), nullptr};
    able += able.empty() ? candidate.name : std::string(", ") + candidate.name;
  }
  static std::string error;
  error = std::string("RNNLM_CPU_ISA='") + wanted + "' is not an instruction set of this CPU and " +
          "build; expected 'auto' or one of: " + able;
  return {generic::kernels(), error.c_str()};
}

}  // namespace

const Choice& choose() {
  static const Choice choice = pick();
  return choice;
}

}  // namespace rnnlm::cpu
