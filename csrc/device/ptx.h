// What kernels need of the machine and C++ does not have, under names that say what it is for.
// Every wrapper has two bodies: PTX here, and the same behaviour on a CPU in emulator/ptx.h.
//
// Memory: `relaxed` accesses are single 32-bit words (a vector of four is four of them) that other
// CTAs see in any order; `release` orders everything this CTA stored before (through a preceding
// __syncthreads) in front of the store, `acquire` everything read after behind the load. A release
// costs a MEMBAR that waits for every outstanding store, half a microsecond: not for the inner path
// of a time step. Scope is the GPU unless a name says cluster.
#pragma once

#include "device/platform.h"

#if !defined(__CUDACC__)
#include "emulator/ptx.h"
#else

namespace rnnlm::ptx {

// --- threads -------------------------------------------------------------------------------------

// The most dynamic shared memory that a CTA of the architecture can have. A kernel that needs more
// is never launched there, and need not be compiled.
#if !defined(__CUDA_ARCH__)
constexpr int kMostSharedBytes = 227 * 1024;
#elif __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 870
constexpr int kMostSharedBytes = 163 * 1024;
#elif __CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200
constexpr int kMostSharedBytes = 99 * 1024;
#else
constexpr int kMostSharedBytes = 227 * 1024;
#endif

// Whether kernels whose copies go to several CTAs at once have a body. Such copies exist from sm_90
// on, but PTX promises their speed for targets with an `a` or `f` only, and of these we compile
// 90a.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1000)
constexpr bool kHasMulticast = false;
#else
constexpr bool kHasMulticast = true;
#endif

// Dynamic shared memory of the CTA, aligned to 128 bytes.
RNNLM_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char rnnlm_dynamic_shared[];
  return rnnlm_dynamic_shared;
}

// All 32 lanes take part in each of these.
RNNLM_DEVICE void warp_sync() {
  __syncwarp();
}
RNNLM_DEVICE bool warp_any(bool predicate) {
  return __any_sync(0xFFFFFFFFu, predicate);
}
template <class V>  // uint32_t, float or double
RNNLM_DEVICE V shuffle(V value, int lane) {
  return __shfl_sync(0xFFFFFFFFu, value, lane);
}
template <class V>
RNNLM_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

// The value, computed here once: not again where it is used, for the sake of a register, nor only
// there. For what would otherwise delay the path of a time step.
template <class V>  // 32 or 64 bits
RNNLM_DEVICE V computed(V value) {
  if constexpr (sizeof(V) == 8)
    asm volatile("" : "+l"(value));
  else
    asm volatile("" : "+r"(value));
  return value;
}

// --- global memory -------------------------------------------------------------------------------

RNNLM_DEVICE uint32_t ld_relaxed(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
RNNLM_DEVICE uint4 ld_relaxed_v4(const uint4* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
RNNLM_DEVICE uint32_t ld_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
RNNLM_DEVICE void st_relaxed(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
RNNLM_DEVICE void st_relaxed_v4(uint4* p, uint4 v) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}
RNNLM_DEVICE void st_release(uint32_t* p, uint32_t v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
RNNLM_DEVICE void red_release_add(uint32_t* p, uint32_t v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// A plain store of a word that other CTAs of the same launch read after a release: the emulator
// must know of it to delay it. Words that only the next launch reads are stored with `=`.
RNNLM_DEVICE void st_weak(uint32_t* p, uint32_t v) {
  *p = v;
}

// A hint that a load of this address will follow: brings its line into L2.
RNNLM_DEVICE void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// Lets other CTAs run between two polls of a wait.
RNNLM_DEVICE void pause() {
  __nanosleep(20);
}
RNNLM_DEVICE uint64_t nanoseconds() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

// --- clusters: shared memory of the CTAs that run side by side (sm_90 and newer) -----------------

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
RNNLM_DEVICE uint32_t cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %cluster_ctarank;" : "=r"(r));
  return r;
}
// Shared-memory address of p as a number, and the same place in the CTA `rank` of the cluster.
RNNLM_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
RNNLM_DEVICE uint32_t cluster_address(uint32_t address, uint32_t rank) {
  uint32_t r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
  return r;
}
// Stores 16 bytes into a CTA of the cluster and counts them at that CTA's mbarrier when they are
// there: whoever saw the phase end sees the bytes.
RNNLM_DEVICE void st_async_v4(uint32_t cluster_address, uint4 v, uint32_t cluster_mbarrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(cluster_address),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(cluster_mbarrier)
      : "memory");
}
RNNLM_DEVICE void mbarrier_init(uint32_t address, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(arrivals) : "memory");
}
// Makes the initialisation visible to the cluster; a cluster barrier must follow.
RNNLM_DEVICE void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
RNNLM_DEVICE void mbarrier_arrive_expect_tx(uint32_t address, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes)
               : "memory");
}
// Whether the phase of this parity has ended.
RNNLM_DEVICE bool mbarrier_try_wait(uint32_t address, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n .reg .pred p;\n"
      " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      " selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(address), "r"(parity)
      : "memory");
  return done != 0;
}
// Arrives at an mbarrier of a CTA of the cluster. Orders nothing: a release among CTAs is a MEMBAR.
RNNLM_DEVICE void mbarrier_arrive_cluster(uint32_t cluster_mbarrier) {
  asm volatile(
      "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(cluster_mbarrier)
      : "memory");
}
// Copies `bytes` (a multiple of 16) of global memory, read once, to the same place in the shared
// memory of each CTA whose bit is set in `ctas`, and counts them at the same mbarrier of each as
// they arrive there. It reads through the async proxy, in any order: words that others store
// meanwhile may arrive as they were before.
RNNLM_DEVICE void copy_multicast(uint32_t address, const void* from, uint32_t bytes,
                                 uint32_t mbarrier, uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;" ::"r"(address),
      "l"(from), "r"(bytes), "r"(mbarrier), "h"(ctas)
      : "memory");
}
// Between loads of global memory and copies that are to see what the loads saw. (No MEMBAR, as the
// fence of all memory is.)
RNNLM_DEVICE void fence_async_copies() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
// Between stores to shared memory and copies that are to overwrite them.
RNNLM_DEVICE void fence_async_overwriting() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// All threads of all CTAs of the cluster; orders memory (strict) or only time (relaxed).
RNNLM_DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
RNNLM_DEVICE void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
RNNLM_DEVICE void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
#endif

// --- programmatic dependent launch: a launch may begin before the one in front of it has ended

// Waits until all that earlier launches of the stream wrote is there. Without the launch attribute,
// or before sm_90, it is there from the start.
RNNLM_DEVICE void wait_for_earlier_launches() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next launch of the stream may start now; it still waits for our end before it reads.
RNNLM_DEVICE void let_next_launch_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// --- tensor cores: d += a b on one warp; fragments as PTX lays them out --------------------------
//
// With g = lane / 4 and t = lane % 4, d[0..1] is row g, columns 2t and 2t + 1; d[2..3] row g + 8.

// m16n8k16. a: {row g, k 2t..}, {g + 8, 2t..}, {g, 2t + 8..}, {g + 8, 2t + 8..}, two values a word;
// b: column g, {k 2t..}, {2t + 8..}.
RNNLM_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
RNNLM_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// m16n8k8, one value a word, its low 13 bits ignored. a: {row g, k t}, {g + 8, t}, {g, t + 4},
// {g + 8, t + 4}; b: column g, {k t}, {t + 4}.
RNNLM_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Nearest tf32 (ties away from zero), as float bits.
RNNLM_DEVICE uint32_t to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}

// --- numbers -------------------------------------------------------------------------------------

RNNLM_DEVICE uint32_t float_bits(float x) {
  return __float_as_uint(x);
}
RNNLM_DEVICE float float_from_bits(uint32_t bits) {
  return __uint_as_float(bits);
}
RNNLM_DEVICE double double_from_bits(uint32_t low, uint32_t high) {
  return __hiloint2double(static_cast<int>(high), static_cast<int>(low));
}
RNNLM_DEVICE void double_bits(double x, uint32_t& low, uint32_t& high) {
  low = static_cast<uint32_t>(__double2loint(x));
  high = static_cast<uint32_t>(__double2hiint(x));
}
// 2^x and 1 / x to 2 units in the last place, one instruction each. Numbers below 2^-126 are 0.
RNNLM_DEVICE float exp2_approx(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
RNNLM_DEVICE float reciprocal_approx(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
// Round to nearest even; NaN stays NaN.
RNNLM_DEVICE uint16_t bf16_bits(float x) {
  uint16_t r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
RNNLM_DEVICE uint16_t f16_bits(float x) {
  uint16_t r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
// Two at once, the first in the low half: one instruction, where a single one takes the long way.
RNNLM_DEVICE uint32_t bf16_pair_bits(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
RNNLM_DEVICE uint32_t f16_pair_bits(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
RNNLM_DEVICE float f16_value(uint16_t bits) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
  return r;
}

}  // namespace rnnlm::ptx

#endif
