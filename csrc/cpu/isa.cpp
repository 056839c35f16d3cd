#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels.h"
#include "parallel.h"

#if defined(RNNLM_HAVE_AVX512BF16) || defined(RNNLM_HAVE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rnnlm::cpu {
namespace {

struct Candidate {
  const char* name;
  bool runs_here;
  Kernels (*kernels)();
  bool wanted = true;  // unless asked for by name
};

#if defined(RNNLM_HAVE_AVX512)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#if defined(RNNLM_HAVE_AVX512BF16) || defined(RNNLM_HAVE_AMX)
// Asked of the CPU itself: compilers that can produce these instructions do not all know how to.
bool has_avx512bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return has_avx512() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
}
#endif

#if defined(RNNLM_HAVE_AMX)
// Linux lets a process use tiles once it has asked: their 8 KB change what a signal handler's stack
// must hold. The answer holds for all its threads. Kernels before 5.16 refuse.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  return has_avx512bf16() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBf16) &&
         (edx & kTile) && may_use_tiles();
}
#endif

Choice pick() {
  // Best first.
  const Candidate candidates[] = {
#if defined(RNNLM_HAVE_AMX)
      {"amx", has_amx(), amx::kernels},
#endif
#if defined(RNNLM_HAVE_AVX512BF16)
      // Intel's cores take two cycles for an instruction of twice the multiplications, half their
      // rate of fma (measured on Sapphire Rapids: docs/performance-log.md).
      {"avx512bf16", has_avx512bf16(), avx512bf16::kernels, !__builtin_cpu_is("intel")},
#endif
#if defined(RNNLM_HAVE_AVX512)
      {"avx512", has_avx512(), avx512::kernels},
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
    if (free_choice ? candidate.wanted : std::strcmp(wanted, candidate.name) == 0)
      return {candidate.kernels(), nullptr, is_amd()};
    able += able.empty() ? candidate.name : std::string(", ") + candidate.name;
  }
  static std::string error;
  error = std::string("RNNLM_CPU_ISA='") + wanted + "' is not an instruction set of this CPU and " +
          "build; expected 'auto' or one of: " + able;
  return {generic::kernels(), error.c_str(), false};
}

}  // namespace

const Choice& choose() {
  static const Choice choice = pick();
  return choice;
}

}  // namespace rnnlm::cpu
