// The part of a linear + cross-entropy head that is not a matrix product: logits of some rows
// become losses and, in place, the gradient with respect to the logits. Compiled once per
// instruction set (RNNLM_ISA names it).
//
// How a call runs. Threads split the rows. A row is swept three times: its maximum; the
// exponentials and their sum; the gradient. A row of a vocabulary (40 KB for 10,000 float32) is
// still in the L2 cache at the second and third sweep, so memory is read and written once. float32
// and float64 keep the exponentials in the row itself, 16-bit types in float32 in the workspace:
// rounding them before they are normalised would round the gradient twice.
//
// The bias is added here, as the logits are read: a GEMM that starts from the bias would first have
// to write it to every row. Its gradient is the sum of the gradient's rows, which every thread adds
// up in a row of its own; thread 0 adds those in the order of the threads. Results are the same
// bits for the same number of threads, and losses and logits' gradients for any number.

#include <math.h>

#include "kernels.h"
#include "parallel.h"
#include "vec.h"

namespace rnnlm::cpu::RNNLM_ISA {
namespace {

// e^x for x <= 0, and 0 where that is below 1e-34 (float64: 1e-299): the products that follow take
// many times longer on denormal numbers, which a confident model has everywhere. A NaN stays one.
template <class T>
RNNLM_INLINE Vec<T> exponential(Vec<T> x) {
  constexpr T kSmallest = sizeof(T) == 4 ? T(-80) : T(-690);
  const Reduced<T> e = reduce<T>(x);
  const Vec<T> scale = power_of_two<T>(e.n);
  const Vec<T> value = fma(e.q, scale, scale);
  return x < kSmallest ? Vec<T>{} : value;
}

template <class S>
class CrossEntropyTask {
 public:
  using T = Arithmetic<S>;
  using V = Vec<T>;
  static constexpr int L = kLanes<T>;
  static constexpr int kChains = 4;  // independent sums and maxima, to hide the latency of one
  static constexpr bool kInPlace = sizeof(S) == sizeof(T);

  CrossEntropyTask(const CrossEntropy& p, T** bias_sums) : p_(p), bias_sums_(bias_sums) {}

  void run(int thread, int threads) {
    const int64_t width = (p_.classes + L - 1) / L * L;
    const int64_t scratch_rows = (kInPlace ? 0 : 1) + (p_.bias_grad ? 1 : 0);
    T* scratch = nullptr;
    if (scratch_rows) {
      scratch = static_cast<T*>(workspace(size_t(scratch_rows * width) * sizeof(T)));
      if (!scratch) __atomic_store_n(&failed_, true, __ATOMIC_RELAXED);
    }
    T* bias_sum = p_.bias_grad ? scratch : nullptr;
    bias_sums_[thread] = bias_sum;
    if (bias_sum) memset(bias_sum, 0, size_t(width) * sizeof(T));
    if (scratch || !scratch_rows) {
      const int64_t end = p_.rows * (thread + 1) / threads;
      for (int64_t row = p_.rows * thread / threads; row < end; ++row)
        one_row(row, kInPlace ? nullptr : scratch + (p_.bias_grad ? width : 0), bias_sum);
    }
    if (!p_.bias_grad) return;
    barrier_.wait(threads);
    if (thread != 0 || failed()) {
      barrier_.wait(threads);
      return;
    }
    T* total = static_cast<T*>(p_.bias_grad);
    for (int64_t j = 0; j < p_.classes; j += L) {
      V sum = load(total + j, p_.classes - j);
      for (int i = 0; i < threads; ++i) sum = sum + load(bias_sums_[i] + j);
      store(total + j, sum, p_.classes - j);
    }
    barrier_.wait(threads);
  }

  bool failed() const { return __atomic_load_n(&failed_, __ATOMIC_RELAXED); }

 private:
  // Logits with their bias; lanes behind the last class hold -inf, which changes no maximum and
  // adds nothing to a sum.
  RNNLM_INLINE V logits(const S* row, int64_t j) const {
    const S* bias = static_cast<const S*>(p_.bias);
    const int64_t left = p_.classes - j;
    if (__builtin_expect(left >= L, 1))
      return bias ? load(row + j) + load(bias + j) : load(row + j);
    V x = load(row + j, left);
    if (bias) x = x + load(bias + j, left);
    return among_first(left, x, splat(-T(INFINITY)));
  }

  // The first n lanes of one vector and the others of another.
  static RNNLM_INLINE V among_first(int64_t n, V a, V b) {
    Bits<T> lane;
    for (int l = 0; l < L; ++l) lane[l] = l;
    return lane < Bits<T>{} + decltype(Bits<T>{}[0] + 0)(n < L ? n : L) ? a : b;
  }

  RNNLM_INLINE V class_weights(int64_t j) const {
    return load(static_cast<const T*>(p_.class_weight) + j, p_.classes - j);
  }

  // Calls body(j, chain) for each vector of classes, with chains in turn.
  template <class F>
  RNNLM_INLINE void sweep(F body) const {
    int64_t j = 0;
    for (; j + kChains * L <= p_.classes; j += kChains * L)
      for (int chain = 0; chain < kChains; ++chain) body(j + chain * L, chain);
    for (; j < p_.classes; j += L) body(j, 0);
  }

  void one_row(int64_t index, T* exponentials, T* bias_sum) const {
    const int64_t C = p_.classes, target = p_.target[index];
    S* row = static_cast<S*>(p_.logits) + index * C;
    T& loss = static_cast<T*>(p_.losses)[index];
    if (target == p_.ignore_index) {
      loss = 0;
      if (p_.gradient) memset(row, 0, size_t(C) * sizeof(S));
      return;
    }
    V chains[kChains];
    for (V& chain : chains) chain = splat(-T(INFINITY));
    sweep([&](int64_t j, int chain) {
      const V x = logits(row, j);
      chains[chain] = x > chains[chain] ? x : chains[chain];
    });
    for (int chain = kChains / 2; chain > 0; chain /= 2)
      for (int i = 0; i < chain; ++i)
        chains[i] = chains[i + chain] > chains[i] ? chains[i + chain] : chains[i];
    T lanes[L];
    store(lanes, chains[0]);
    for (int width = L / 2; width > 0; width /= 2)
      for (int l = 0; l < width; ++l)
        lanes[l] = lanes[l + width] > lanes[l] ? lanes[l + width] : lanes[l];
    const T largest = lanes[0];  // a NaN was passed over and makes the sum NaN

    // Label smoothing needs sum_c w_c (largest - x_c) as well.
    const bool smooth = p_.label_smoothing != 0;
    const T at_target = to_arithmetic(row[target]) +
                        (p_.bias ? to_arithmetic(static_cast<const S*>(p_.bias)[target]) : T(0)) -
                        largest;
    V distances[kChains] = {};
    for (V& chain : chains) chain = V{};
    const bool keep = p_.gradient;
    sweep([&](int64_t j, int chain) {
      const V below = logits(row, j) - largest;
      const V e = exponential<T>(below);
      chains[chain] = chains[chain] + e;
      if (smooth) {
        const V distance = p_.class_weight ? below * class_weights(j) : below;
        distances[chain] = distances[chain] - among_first(C - j, distance, V{});
      }
      if (keep) {
        if constexpr (kInPlace)
          store(row + j, e, C - j);
        else
          store(exponentials + j, e);
      }
    });
    const T total = sum<T>((chains[0] + chains[1]) + (chains[2] + chains[3]));
    const T log_total = T(log(double(total)));

    const T* class_weight = static_cast<const T*>(p_.class_weight);
    const T smoothing = T(p_.label_smoothing) / T(C);
    const T hit = (T(1) - T(p_.label_smoothing)) * (class_weight ? class_weight[target] : T(1));
    const T all_weights = class_weight ? T(p_.class_weight_sum) : T(C);
    loss = hit * (log_total - at_target);
    if (smooth) {
      const T distance = sum<T>((distances[0] + distances[1]) + (distances[2] + distances[3]));
      loss += smoothing * (distance + all_weights * log_total);
    }
    if (!p_.gradient) return;

    const T upstream = p_.upstream ? static_cast<const T*>(p_.upstream)[index] : T(1);
    const T scale = upstream * (hit + (smooth ? smoothing * all_weights : T(0))) / total;
    const T even = smooth ? upstream * smoothing : T(0);
    // At the target it is a difference that must not be taken of rounded numbers.
    T exponential;
    if constexpr (kInPlace)
      exponential = row[target];
    else
      exponential = exponentials[target];
    const T target_gradient =
        exponential * scale - even * (class_weight ? class_weight[target] : T(1)) - upstream * hit;
    const T bias_before = bias_sum ? bias_sum[target] : T(0);
    sweep([&](int64_t j, int) {
      V g;
      if constexpr (kInPlace)
        g = load(row + j, C - j) * scale;
      else
        g = load(exponentials + j) * scale;
      if (smooth) g = class_weight ? g - even * class_weights(j) : g - even;
      store(row + j, g, C - j);
      if (bias_sum) store(bias_sum + j, load(bias_sum + j) + g);
    });
    if (bias_sum) bias_sum[target] = bias_before + target_gradient;
    V rounded = splat(target_gradient);
    store(row + target, rounded, 1);
  }

  CrossEntropy p_;
  T** bias_sums_;
  Barrier barrier_;
  bool failed_ = false;
};

template <class S>
Result run(const CrossEntropy& p) {
  constexpr int kMaxThreads = 256;
  Arithmetic<S>* bias_sums[kMaxThreads];
  CrossEntropyTask<S> task(p, bias_sums);
  int64_t threads = p.threads < kMaxThreads ? p.threads : kMaxThreads;
  // A thread is worth its start from some microseconds of work on.
  constexpr int64_t kElementsPerThread = 16384;
  const int64_t useful = p.rows * p.classes / kElementsPerThread + 1;
  if (threads > useful) threads = useful;
  if (threads > p.rows) threads = p.rows;
  parallel(
      int(threads),
      [](void* context, int thread, int team) {
        static_cast<CrossEntropyTask<S>*>(context)->run(thread, team);
      },
      &task);
  return task.failed() ? Result::out_of_memory : Result::ok;
}

}  // namespace

Result cross_entropy(const CrossEntropy& p) {
  switch (p.dtype) {
    case DType::f64:
      return run<double>(p);
    case DType::bf16:
      return run<bf16>(p);
    case DType::f16:
      return run<f16>(p);
    case DType::f32:
      break;
  }
  return run<float>(p);
}

}  // namespace rnnlm::cpu::RNNLM_ISA
