// Vectors of floats for one instruction set, on top of the GCC/Clang vector extension: the compiler
// turns the same source into AVX-512, AVX2, SSE2 or NEON. Included only by sources that are
// compiled once per instruction set (RNNLM_ISA_SOURCES in CMakeLists.txt); everything lives in that
// instruction set's own namespace, so that no function compiled for a newer CPU can be picked for
// an older one by the linker.
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace rnnlm::cpu::RNNLM_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define RNNLM_INLINE inline __attribute__((always_inline))

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
using Bits = typename VecOf<T>::bits;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

// 16-bit storage types. Arithmetic on them is done in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class S>
struct ArithmeticOf {
  using type = S;
};
template <>
struct ArithmeticOf<bf16> {
  using type = float;
};
template <>
struct ArithmeticOf<f16> {
  using type = float;
};
template <class S>
using Arithmetic = typename ArithmeticOf<S>::type;

// --- fused multiply-add --------------------------------------------------------------------------

#if defined(__AVX512F__)
RNNLM_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
RNNLM_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(__AVX2__)
RNNLM_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
RNNLM_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#elif defined(__aarch64__)
RNNLM_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
RNNLM_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else  // no hardware fma: two roundings
template <class V>
RNNLM_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}
#endif

template <class T>
RNNLM_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // not {} + x, which costs an addition: it turns -0 into +0
}

// Sum of the lanes, halves added pairwise: a fixed order, whatever the compiler likes.
template <class T>
RNNLM_INLINE T sum(Vec<T> v) {
  T part[kLanes<T>];
  memcpy(part, &v, sizeof v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) part[l] += part[l + width];
  return part[0];
}
#if defined(__AVX2__)
template <>
RNNLM_INLINE float sum<float>(Vec<float> v) {
#if defined(__AVX512F__)
  const __m256 v8 =
      _mm256_add_ps(_mm512_extractf32x8_ps((__m512)v, 0), _mm512_extractf32x8_ps((__m512)v, 1));
#else
  const __m256 v8 = (__m256)v;
#endif
  const __m128 v4 = _mm_add_ps(_mm256_castps256_ps128(v8), _mm256_extractf128_ps(v8, 1));
  const __m128 v2 = _mm_add_ps(v4, _mm_movehl_ps(v4, v4));
  return _mm_cvtss_f32(_mm_add_ss(v2, _mm_movehdup_ps(v2)));
}
#elif defined(__aarch64__)
template <>
RNNLM_INLINE float sum<float>(Vec<float> v) {
  const float32x4_t v4 = (float32x4_t)v;
  return vpadds_f32(vadd_f32(vget_low_f32(v4), vget_high_f32(v4)));
}
#endif

// out[i] += sum(v[i]), i < 4, in the order of `sum`.
template <class T>
RNNLM_INLINE void add_sums(const Vec<T> (&v)[4], T* out) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) out[i] += sum<T>(v[i]);
}
#if defined(__AVX512F__)
template <>
RNNLM_INLINE void add_sums<float>(const Vec<float> (&v)[4], float* out) {
  constexpr __mmask16 every = 0xffff;  // GCC warns of the forms without a mask
  const auto halves = [](Vec<float> a, Vec<float> b) {
    return _mm512_add_ps(_mm512_maskz_shuffle_f32x4(every, (__m512)a, (__m512)b, 0x44),
                         _mm512_maskz_shuffle_f32x4(every, (__m512)a, (__m512)b, 0xee));
  };
  const __m512 v01 = halves(v[0], v[1]), v23 = halves(v[2], v[3]);
  __m512 quarters = _mm512_add_ps(_mm512_maskz_shuffle_f32x4(every, v01, v23, 0x88),
                                  _mm512_maskz_shuffle_f32x4(every, v01, v23, 0xdd));
  quarters = _mm512_add_ps(quarters, _mm512_maskz_permute_ps(every, quarters, 0x4e));
  quarters = _mm512_add_ps(quarters, _mm512_maskz_permute_ps(every, quarters, 0xb1));
  const __m512 sums = _mm512_maskz_compress_ps(0x1111, quarters);
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), _mm512_maskz_extractf32x4_ps(0xf, sums, 0)));
}
#elif defined(__AVX2__)
template <>
RNNLM_INLINE void add_sums<float>(const Vec<float> (&v)[4], float* out) {
  const auto halves = [](Vec<float> a, Vec<float> b) {
    return _mm256_add_ps(_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x20),
                         _mm256_permute2f128_ps((__m256)a, (__m256)b, 0x31));
  };
  const __m256 v01 = halves(v[0], v[1]), v23 = halves(v[2], v[3]);
  const __m256 quarters = _mm256_add_ps(_mm256_shuffle_ps(v01, v23, 0x44),  // of 0 2, 1 3
                                        _mm256_shuffle_ps(v01, v23, 0xee));
  const __m256 sums = _mm256_add_ps(_mm256_shuffle_ps(quarters, quarters, 0x88),
                                    _mm256_shuffle_ps(quarters, quarters, 0xdd));
  const __m128 in_turn =
      _mm_unpacklo_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), in_turn));
}
#elif defined(__aarch64__)
template <>
RNNLM_INLINE void add_sums<float>(const Vec<float> (&v)[4], float* out) {
  const auto halves = [](Vec<float> a, Vec<float> b) {
    const float32x4_t x = (float32x4_t)a, y = (float32x4_t)b;
    return vcombine_f32(vadd_f32(vget_low_f32(x), vget_high_f32(x)),
                        vadd_f32(vget_low_f32(y), vget_high_f32(y)));
  };
  const float32x4_t sums = vpaddq_f32(halves(v[0], v[1]), halves(v[2], v[3]));
  vst1q_f32(out, vaddq_f32(vld1q_f32(out), sums));
}
#endif

// --- 16-bit conversions --------------------------------------------------------------------------

typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));  // kLanes<float> halves
typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));

// bfloat16: the upper half of a float. Rounded to nearest even; a NaN stays a NaN (its payload
// could round to infinity). Compilers take the portable form apart, into 256-bit halves for AVX-512
// and into single numbers for NEON.
#if defined(__AVX512F__)
RNNLM_INLINE Vec<float> widen(Half v, bf16) {
  return (Vec<float>)((Word)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v) << 16);
}
RNNLM_INLINE Half narrow(Vec<float> v, bf16) {
  const Word bits = (Word)v, upper = bits >> 16;
  const Word rounded = (bits + 0x7fffu + (upper & 1u)) >> 16;
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  const __m512i result =
      _mm512_mask_or_epi32((__m512i)rounded, nan, (__m512i)upper, (__m512i)(Word{} + 0x40u));
  return (Half)_mm512_maskz_cvtepi32_epi16(0xffff, result);
}
#elif defined(__aarch64__)
RNNLM_INLINE Vec<float> widen(Half v, bf16) {
  return (Vec<float>)vshll_n_u16((uint16x4_t)v, 16);
}
RNNLM_INLINE Half narrow(Vec<float> v, bf16) {
  const Word bits = (Word)v;
  const Word rounded = bits + 0x7fffu + ((bits >> 16) & 1u), nan = bits | 0x400000u;
  const uint32x4_t number = vceqq_f32((float32x4_t)v, (float32x4_t)v);
  return (Half)vshrn_n_u32(vbslq_u32(number, (uint32x4_t)rounded, (uint32x4_t)nan), 16);
}
#else
RNNLM_INLINE Vec<float> widen(Half v, bf16) {
  return (Vec<float>)(__builtin_convertvector(v, Word) << 16);
}
RNNLM_INLINE Half narrow(Vec<float> v, bf16) {
  const Word bits = (Word)v;
  const Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Word nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector((Word)(v != v) ? nan : rounded, Half);
}
#endif

#if defined(__AVX512F__)
RNNLM_INLINE Vec<float> widen(Half v, f16) {
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)v);
}
RNNLM_INLINE Half narrow(Vec<float> v, f16) {
  return (Half)_mm512_maskz_cvtps_ph(0xffff, (__m512)v,
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__AVX2__)
RNNLM_INLINE Vec<float> widen(Half v, f16) {
  return (Vec<float>)_mm256_cvtph_ps((__m128i)v);
}
RNNLM_INLINE Half narrow(Vec<float> v, f16) {
  return (Half)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__aarch64__)
RNNLM_INLINE Vec<float> widen(Half v, f16) {
  return (Vec<float>)vcvt_f32_f16((float16x4_t)v);
}
RNNLM_INLINE Half narrow(Vec<float> v, f16) {
  return (Half)vcvt_f16_f32((float32x4_t)v);
}
#else
// Exact: a half is a float with its exponent rebased; the multiplication also renormalises.
RNNLM_INLINE Vec<float> widen(Half v, f16) {
  const Word h = __builtin_convertvector(v, Word);
  const Word magnitude = h & 0x7fffu;
  const Vec<float> scaled = (Vec<float>)(magnitude << 13) * 0x1p112f;
  const Word special = (magnitude << 13) | 0x7f800000u;  // inf and NaN
  const Word value = (Word)(magnitude >= 0x7c00u) ? special : (Word)scaled;
  return (Vec<float>)(value | ((h & 0x8000u) << 16));
}
RNNLM_INLINE Half narrow(Vec<float> v, f16) {
  const Word bits = (Word)v;
  const Word sign = (bits >> 16) & 0x8000u;
  const Word magnitude = bits & 0x7fffffffu;
  // Normal results: rebase the exponent by subtraction, round to nearest even on 13 dropped bits.
  const Word normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 aligns the wanted bits at the bottom, with the FPU's rounding.
  const Word tiny = (Word)((Vec<float>)magnitude + 0.5f) - 0x3f000000u;
  Word value = (Word)(magnitude < 0x38800000u) ? tiny : normal;
  value = (Word)(magnitude >= 0x477ff000u) ? (Word{} + 0x7c00u) : value;
  value = (Word)(magnitude > 0x7f800000u) ? (Word{} + 0x7e00u) : value;
  return __builtin_convertvector(value | sign, Half);
}
#endif

// --- loads and stores, of the first n lanes; the others read as zero -----------------------------

template <class T>
RNNLM_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
RNNLM_INLINE void store(T* p, Vec<T> v) {
  memcpy(p, &v, sizeof v);
}
template <class S>
RNNLM_INLINE Vec<float> load16(const S* p) {
  Half v;
  memcpy(&v, p, sizeof v);
  return widen(v, S{});
}
template <class S>
RNNLM_INLINE void store16(S* p, Vec<float> v) {
  const Half h = narrow(v, S{});
  memcpy(p, &h, sizeof h);
}
RNNLM_INLINE Vec<float> load(const bf16* p) {
  return load16(p);
}
RNNLM_INLINE Vec<float> load(const f16* p) {
  return load16(p);
}
RNNLM_INLINE void store(bf16* p, Vec<float> v) {
  store16(p, v);
}
RNNLM_INLINE void store(f16* p, Vec<float> v) {
  store16(p, v);
}

#if defined(__AVX512F__)
RNNLM_INLINE uint16_t first_lanes(int64_t n) {
  return uint16_t((1u << n) - 1);
}
// Of fewer than all lanes.
RNNLM_INLINE Vec<float> load_some(const float* p, int64_t n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(first_lanes(n), p);
}
RNNLM_INLINE Vec<double> load_some(const double* p, int64_t n) {
  return (Vec<double>)_mm512_maskz_loadu_pd(uint8_t(first_lanes(n)), p);
}
template <class S>
RNNLM_INLINE Vec<float> load_some(const S* p, int64_t n) {
  return widen((Half)_mm256_maskz_loadu_epi16(first_lanes(n), p), S{});
}
RNNLM_INLINE void store_some(float* p, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v);
}
RNNLM_INLINE void store_some(double* p, Vec<double> v, int64_t n) {
  _mm512_mask_storeu_pd(p, uint8_t(first_lanes(n)), (__m512d)v);
}
template <class S>
RNNLM_INLINE void store_some(S* p, Vec<float> v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)narrow(v, S{}));
}
#elif defined(__aarch64__)
// Lane by lane: a vector that was put together in memory could be loaded only once all of its parts
// have reached the cache.
template <class S>
RNNLM_INLINE Vec<Arithmetic<S>> load_some(const S* p, int64_t n) {
  std::conditional_t<sizeof(S) == 2, Half, Vec<Arithmetic<S>>> v = {};
#pragma GCC unroll 4
  for (int l = 0; l + 1 < kLanes<Arithmetic<S>>; ++l) {
    if (l >= n) break;
    if constexpr (sizeof(S) == 2)
      v[l] = p[l].bits;
    else
      v[l] = p[l];
  }
  if constexpr (sizeof(S) == 2)
    return widen(v, S{});
  else
    return v;
}
template <class S>
RNNLM_INLINE void store_some(S* p, Vec<Arithmetic<S>> v, int64_t n) {
  if constexpr (sizeof(S) == 2) {
    const Half h = narrow(v, S{});
#pragma GCC unroll 4
    for (int l = 0; l + 1 < kLanes<float>; ++l)
      if (l < n) p[l].bits = h[l];
  } else {
#pragma GCC unroll 4
    for (int l = 0; l + 1 < kLanes<S>; ++l)
      if (l < n) p[l] = v[l];
  }
}
#else
template <class S>
RNNLM_INLINE Vec<Arithmetic<S>> load_some(const S* p, int64_t n) {
  S part[kLanes<Arithmetic<S>>] = {};
  for (int64_t l = 0; l < n; ++l) part[l] = p[l];
  return load(part);
}
template <class S>
RNNLM_INLINE void store_some(S* p, Vec<Arithmetic<S>> v, int64_t n) {
  S part[kLanes<Arithmetic<S>>];
  store(part, v);
  for (int64_t l = 0; l < n; ++l) p[l] = part[l];
}
#endif

template <class S>
RNNLM_INLINE Vec<Arithmetic<S>> load(const S* p, int64_t n) {
  if (__builtin_expect(n >= kLanes<Arithmetic<S>>, 1)) return load(p);
  return load_some(p, n);
}
template <class S>
RNNLM_INLINE void store(S* p, Vec<Arithmetic<S>> v, int64_t n) {
  if (__builtin_expect(n >= kLanes<Arithmetic<S>>, 1)) return store(p, v);
  store_some(p, v, n);
}

// For what only products and derivatives will read: numbers below 2^-126 may be stored as zero,
// which is what the CPU's conversion to bfloat16 does, in one instruction instead of ten.
template <class S>
RNNLM_INLINE void store_flushing(S* p, Vec<Arithmetic<S>> v, int64_t n) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(S) == 2) {
    if constexpr (std::is_same<S, bf16>::value) {
      const __m256i h = (__m256i)_mm512_cvtneps_pbh((__m512)v);
      if (__builtin_expect(n >= kLanes<float>, 1)) return _mm256_storeu_si256((__m256i*)p, h);
      return _mm256_mask_storeu_epi16(p, first_lanes(n), h);
    }
  }
#endif
  store(p, v, n);
}

template <class S>
RNNLM_INLINE Arithmetic<S> to_arithmetic(S x) {
  if constexpr (sizeof(S) == 2) {
    S part[kLanes<float>] = {x};
    return load(part)[0];
  } else {
    return x;
  }
}

// --- transposition -------------------------------------------------------------------------------

// a[0] b[0] a[1] b[1] .. from element `first` on.
template <int first, class T, size_t... I>
RNNLM_INLINE Vec<T> interleaved(Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, int(first + I / 2 + I % 2 * kLanes<T>)...);
#else
  return __builtin_shuffle(a, b, Bits<T>{int(first + I / 2 + I % 2 * kLanes<T>)...});
#endif
}

// Rows become columns. Each pass deals the rows of both halves out to pairs of rows, one element of
// each in turn; after as many passes as an index has bits, its bits have all changed sides.
template <class T>
RNNLM_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int L = kLanes<T>;
  constexpr auto all = std::make_index_sequence<L>();
#pragma GCC unroll 4
  for (int pass = 1; pass < L; pass *= 2) {
    Vec<T> dealt[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      dealt[2 * i] = interleaved<0, T>(rows[i], rows[i + L / 2], all);
      dealt[2 * i + 1] = interleaved<L / 2, T>(rows[i], rows[i + L / 2], all);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = dealt[i];
  }
}

// --- exp, sigmoid, tanh --------------------------------------------------------------------------
// x = n ln2 + r with |r| <= ln2/2; e^r - 1 by its Taylor series, whose first left-out term is below
// a tenth of an ulp; 2^n by an instruction, or by building the exponent, in two factors where n may
// leave the range of normal numbers. Measured errors: tests/test_cpu_math.py.

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float log2e = 1.44269504088896341f;
  static constexpr float ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
  static constexpr float magic = 0x1.8p23f;  // adding it rounds to an integer
  static constexpr float overflow = 89.0f, underflow = -104.0f;
  static constexpr int mantissa = 23, bias = 127, terms = 7;
  static constexpr int32_t sign_bit = INT32_MIN;
};
template <>
struct ExpConstants<double> {
  static constexpr double log2e = 1.44269504088896340736;
  static constexpr double ln2_hi = 6.93147180369123816490e-01, ln2_lo = 1.90821492927058770002e-10;
  static constexpr double magic = 0x1.8p52;
  static constexpr double overflow = 710.0, underflow = -746.0;
  static constexpr int mantissa = 52, bias = 1023, terms = 13;
  static constexpr int64_t sign_bit = INT64_MIN;
};

constexpr double inverse_factorial(int n) {
  double value = 1;
  for (int i = 2; i <= n; ++i) value /= i;
  return value;
}

// sum_{k=first}^{last} r^(k-first) / k!, by Horner's rule.
template <class T, int first, int last>
RNNLM_INLINE Vec<T> taylor(Vec<T> r) {
  if constexpr (first == last) {
    return splat(T(inverse_factorial(first)));
  } else {
    return fma(taylor<T, first + 1, last>(r), r, splat(T(inverse_factorial(first))));
  }
}

template <class T>
struct Reduced {
  Vec<T> q;  // e^r - 1
  Vec<T> n;  // an integer
};

template <class T>
RNNLM_INLINE Reduced<T> reduce(Vec<T> x) {
  using C = ExpConstants<T>;
  const Vec<T> n = fma(x, splat(C::log2e), splat(C::magic)) - C::magic;
  Vec<T> r = fma(n, splat(-C::ln2_hi), x);
  r = fma(n, splat(-C::ln2_lo), r);
  return {fma(taylor<T, 2, C::terms>(r), r * r, r), n};
}

// x, but at most (at least) a limit; NaN stays NaN. Then, for integers n: x 2^n, where n may leave
// the range of normal numbers, and 2^n, where it does not.
#if defined(__AVX512F__)
template <class T>
RNNLM_INLINE Vec<T> at_most(Vec<T> x, T limit) {
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_min_ps(0xffff, (__m512)splat(limit), (__m512)x);
  else
    return (Vec<T>)_mm512_maskz_min_pd(0xff, (__m512d)splat(limit), (__m512d)x);
}
template <class T>
RNNLM_INLINE Vec<T> at_least(Vec<T> x, T limit) {
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_max_ps(0xffff, (__m512)splat(limit), (__m512)x);
  else
    return (Vec<T>)_mm512_maskz_max_pd(0xff, (__m512d)splat(limit), (__m512d)x);
}
template <class T>
RNNLM_INLINE Vec<T> scaled(Vec<T> x, Vec<T> n) {
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_scalef_ps(0xffff, (__m512)x, (__m512)n);
  else
    return (Vec<T>)_mm512_maskz_scalef_pd(0xff, (__m512d)x, (__m512d)n);
}
template <class T>
RNNLM_INLINE Vec<T> power_of_two(Vec<T> n) {
  return scaled<T>(splat(T(1)), n);
}
#else
template <class T>
RNNLM_INLINE Vec<T> at_most(Vec<T> x, T limit) {
  return x > limit ? splat(limit) : x;
}
template <class T>
RNNLM_INLINE Vec<T> at_least(Vec<T> x, T limit) {
  return x < limit ? splat(limit) : x;
}
template <class T>
RNNLM_INLINE Bits<T> to_bits(Vec<T> n) {
  return (Bits<T>)(n + ExpConstants<T>::magic) - (Bits<T>)splat(ExpConstants<T>::magic);
}
template <class T>
RNNLM_INLINE Vec<T> power_of_two(Bits<T> n) {
  return (Vec<T>)((n + ExpConstants<T>::bias) << ExpConstants<T>::mantissa);
}
template <class T>
RNNLM_INLINE Vec<T> power_of_two(Vec<T> n) {
  return power_of_two<T>(to_bits<T>(n));
}
template <class T>
RNNLM_INLINE Vec<T> scaled(Vec<T> x, Vec<T> n) {
  const Bits<T> whole = to_bits<T>(n), half = whole >> 1;
  return x * power_of_two<T>(half) * power_of_two<T>(whole - half);
}
#endif

template <class T>
RNNLM_INLINE Vec<T> exp(Vec<T> x) {
  using C = ExpConstants<T>;
  const Reduced<T> e = reduce<T>(at_least(at_most(x, C::overflow), C::underflow));
  return scaled<T>(e.q + T(1), e.n);
}

// e^x - 1 for x <= 0, accurate relative to the result near 0.
template <class T>
RNNLM_INLINE Vec<T> expm1_nonpositive(Vec<T> x) {
  // e^-44 is below half an ulp of 1 in float64.
  const Reduced<T> e = reduce<T>(at_least(x, T(-44)));
  const Vec<T> scale = power_of_two<T>(e.n);
  return fma(e.q, scale, scale - T(1));
}

template <class T>
struct Math {
  using V = Vec<T>;
  static RNNLM_INLINE V fma(V a, V b, V c) { return RNNLM_ISA::fma(a, b, c); }
  static RNNLM_INLINE V sigmoid(V x) { return T(1) / (RNNLM_ISA::exp<T>(-x) + T(1)); }
  // tanh|x| = -m / (m + 2) with m = e^(-2|x|) - 1; the sign is put back bit by bit.
  static RNNLM_INLINE V tanh(V x) {
    const Bits<T> sign_mask = Bits<T>{} + ExpConstants<T>::sign_bit;
    const V magnitude = (V)((Bits<T>)x & ~sign_mask);
    const V m = expm1_nonpositive<T>(magnitude * T(-2));
    const Bits<T> result = (Bits<T>)(m / (m + T(2)));
    return (V)((result & ~sign_mask) | ((Bits<T>)x & sign_mask));
  }
};

#if defined(__AVX512BF16__)
// The same for bfloat16, to 1e-5 relative (a hundredth of its half ulp): 2^t is 2^r 2^floor(t),
// with a polynomial in 0 <= r < 1 and the scaling that AVX-512 has an instruction for. Exact at 0
// and where the result saturates.
struct BriefMath {
  using V = Vec<float>;
  static RNNLM_INLINE V fma(V a, V b, V c) { return RNNLM_ISA::fma(a, b, c); }
  static RNNLM_INLINE V fraction(V t) {
    return (V)_mm512_maskz_reduce_ps(0xffff, (__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  }
  static RNNLM_INLINE V scale(V x, V t) {
    return (V)_mm512_maskz_scalef_ps(0xffff, (__m512)x, (__m512)t);
  }

  static RNNLM_INLINE V sigmoid(V x) {
    const V t = x * -1.44269504f, r = fraction(t);
    V p = fma(r, splat(0.0134266894f), splat(0.0522424653f));
    p = fma(r, p, splat(0.241280213f));
    p = fma(r, p, splat(0.693044841f));
    p = fma(r, p, splat(1.0f));
    return 1.0f / (scale(p, t) + 1.0f);
  }
  // (e^2|x| - 1) / (e^2|x| + 1), the sign put back. The numerator is accurate relative to itself.
  static RNNLM_INLINE V tanh(V x) {
    const Bits<float> sign = Bits<float>{} + INT32_MIN;
    V t = (V)((Bits<float>)x & ~sign) * 2.88539008f;
    t = (V)_mm512_maskz_min_ps(0xffff, (__m512)splat(126.0f),
                               (__m512)t);  // the second if it is NaN
    const V r = fraction(t), s = scale(splat(1.0f), t);
    V p = fma(r, splat(0.00178143347f), splat(0.00921307318f));
    p = fma(r, p, splat(0.0556486584f));
    p = fma(r, p, splat(0.240208834f));
    p = fma(r, p, splat(0.69314754f));
    const V m = fma(p * r, s, s - 1.0f);
    const V y = m / (m + 2.0f);
    return (V)(((Bits<float>)x & sign) | (Bits<float>)y);
  }
};
#endif

}  // namespace rnnlm::cpu::RNNLM_ISA
