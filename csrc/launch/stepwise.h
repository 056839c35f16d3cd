// The stepwise tier: a host loop that launches one kernel a step, or two (GRU with the reset before
// the product, LSTM with a projection). Included by one file per dtype, so that they compile side
// by side, and by stepwise.cu, which chooses among them.
//
// The loop does no more for a launch than to work out its pointers and sizes. Nothing is allocated,
// waited for or read back, and kernels see no host memory: a call can be captured into a graph.
#pragma once

#include <algorithm>

#include "core/params.h"
#include "kernels/step_backward.cuh"
#include "kernels/step_forward.cuh"
#include "launch/stepwise_launcher.h"
#include "launch/tiers.h"

namespace rnnlm {

// The functions of launch/tiers.h for tensors of T.
template <class T>
struct Stepwise {
  static int64_t workspace(const CudaProblem& problem);
  static Status lstm_forward(const LstmForward& layer, const CudaCall& call);
  static Status lstm_backward(const LstmBackward& layer, const CudaCall& call);
  static Status gru_forward(const GruForward& layer, const CudaCall& call);
  static Status gru_backward(const GruBackward& layer, const CudaCall& call);
};

extern template struct Stepwise<float>;
extern template struct Stepwise<double>;
extern template struct Stepwise<Bf16>;
extern template struct Stepwise<F16>;

// Undefined at the end of the file.
#define RNNLM_RETURN_IF_NOT_OK(expression) \
  do {                                     \
    const Status status = (expression);    \
    if (!status.is_ok()) return status;    \
  } while (false)

template <class T>
int64_t Stepwise<T>::workspace(const CudaProblem& problem) {
  if (problem.pass == Pass::forward) {
    return stepwise::ForwardSpace<T>(nullptr, problem.cell, problem.batch, problem.hidden,
                                     problem.proj)
        .bytes;
  }
  return stepwise::BackwardSpace<T>(nullptr, problem.cell, problem.batch, problem.hidden,
                                    problem.proj)
      .bytes;
}

// --- LSTM ----------------------------------------------------------------------------------------

template <class T>
Status Stepwise<T>::lstm_forward(const LstmForward& layer, const CudaCall& call) {
  using namespace stepwise;
  using A = Arithmetic<T>;
  using Gates = CellStep<T, LstmCell<T>>;
  const int64_t H = layer.hidden, B = layer.seq.batch, R = layer.proj > 0 ? layer.proj : H;
  const bool projects = layer.proj > 0;
  const ForwardSpace<T> space(call.workspace, Cell::lstm, B, H, layer.proj);

  Launcher<T> launcher(call);
  RNNLM_RETURN_IF_NOT_OK(launcher.begin());
  RNNLM_RETURN_IF_NOT_OK(
      launcher.clear_padding(space.h[0], space.padded_bytes,
                             space.h_stride != R || (projects && space.inner_stride != H)));
  const T *h0, *w_hh, *w_hr = nullptr;
  RNNLM_RETURN_IF_NOT_OK(launcher.readable(layer.h0, B, R, space.h0, &h0));
  RNNLM_RETURN_IF_NOT_OK(launcher.readable(layer.w_hh, 4 * H, R, space.w_hh, &w_hh));
  if (projects) RNNLM_RETURN_IF_NOT_OK(launcher.readable(layer.w_hr, R, H, space.w_hr, &w_hr));

  int turn = 0;
  for (StepCursor step(layer.seq, Pass::forward); step.now.rows > 0; step.advance(), turn ^= 1) {
    const int64_t first = step.now.first;
    const int rows = step.now.rows;
    StepOutput<T> out{space.h[turn ^ 1], space.h_stride, at<T>(layer.output, first, R),
                      static_cast<T*>(layer.h_n), std::min(rows, step.after.rows)};
    typename Gates::Params p{};
    p.product = product_of(w_hh, space.h[turn], H, space.h_stride, rows);
    p.product.initial = h0;
    p.product.carried = std::min(rows, step.before.rows);
    p.rows = rows;
    p.out = out;
    if (projects) {
      p.out.h = space.inner;
      p.out.h_stride = space.inner_stride;
      p.out.output = nullptr;
    }
    p.gates_x = at<const T>(layer.gates_x, first, 4 * H);
    p.b_hh = static_cast<const T*>(layer.b_hh);
    p.initial = static_cast<const T*>(layer.c0);
    p.state = space.state;
    p.c_n = static_cast<T*>(layer.c_n);
    p.cells = at<A>(layer.cells, first, H);
    p.saved = at<T>(layer.saved, first, 4 * H);
    RNNLM_RETURN_IF_NOT_OK(launcher.template step<Gates>("launching a forward step of an LSTM", p));
    if (!projects) continue;
    typename ProjectStep<T>::Params q{};
    q.product = product_of(w_hr, space.inner, R, space.inner_stride, rows);
    q.rows = rows;
    q.out = out;
    RNNLM_RETURN_IF_NOT_OK(
        launcher.template step<ProjectStep<T>>("launching the projection of a step", q));
  }
  return Status::ok();
}

template <class T>
Status Stepwise<T>::lstm_backward(const LstmBackward& layer, const CudaCall& call) {
  using namespace stepwise;
  using A = Arithmetic<T>;
  using Gates = LstmBackwardStep<T>;
  using Project = ProjectBackwardStep<T>;
  const int64_t H = layer.hidden, B = layer.seq.batch, R = layer.proj > 0 ? layer.proj : H;
  const bool projects = layer.proj > 0, wants_initial = layer.dh0 != nullptr;
  const BackwardSpace<T> space(call.workspace, Cell::lstm, B, H, layer.proj);

  Launcher<T> launcher(call);
  RNNLM_RETURN_IF_NOT_OK(launcher.begin());
  RNNLM_RETURN_IF_NOT_OK(launcher.clear_padding(
      space.next[0], space.padded_bytes,
      space.next_stride != space.depth || space.inner_stride != space.inner_depth));
  RNNLM_RETURN_IF_NOT_OK(
      launcher.transpose(static_cast<const T*>(layer.w_hh), 4 * H, R, space.w_hh));
  if (projects) {
    RNNLM_RETURN_IF_NOT_OK(
        launcher.transpose(static_cast<const T*>(layer.w_hr), R, H, space.w_inner));
  }

  int turn = 0;
  for (StepCursor step(layer.seq, Pass::backward);
       step.now.rows > 0 || (wants_initial && step.before.rows > 0); step.advance(), turn ^= 1) {
    const int64_t first = step.now.first;
    const int now = step.now.rows, arriving = step.before.rows;
    const StepProduct<T> recurrent =
        product_of<T>(space.w_hh, space.next[turn], R, space.next_stride, arriving);
    const StepGradient<T> dh{now, static_cast<const T*>(layer.grad_h_n),
                             at<const T>(layer.grad_output, first, R), static_cast<T*>(layer.dh0)};
    typename Gates::Params p{};
    p.product = recurrent;
    p.rows = std::max(now, arriving);
    p.dh = dh;
    if (projects) {
      typename Project::Params q{};
      q.product = recurrent;
      q.rows = p.rows;
      q.dh = dh;
      q.dproj = at<T>(layer.dproj, first, R);
      q.next = space.inner;
      q.next_stride = space.inner_stride;
      RNNLM_RETURN_IF_NOT_OK(
          launcher.template step<Project>("launching a backward step of a projection", q));
      p.product = product_of<T>(space.w_inner, space.inner, H, space.inner_stride, now);
      p.dh = {now, nullptr, nullptr, nullptr};
    }
    p.carried = std::min(now, step.after.rows);
    p.continued = arriving;
    p.grad_c_n = static_cast<const T*>(layer.grad_c_n);
    p.grad_cells = at<const A>(layer.grad_cells, first, H);
    p.cells = at<const A>(layer.cells, first, H);
    p.cells_before = at<const A>(layer.cells, step.after.first, H);
    p.c0 = static_cast<const T*>(layer.c0);
    p.saved = at<const T>(layer.saved, first, 4 * H);
    p.dgates = at<T>(layer.dgates, first, 4 * H);
    p.next = space.next[turn ^ 1];
    p.next_stride = space.next_stride;
    p.dc = space.kept;
    p.dc0 = static_cast<T*>(layer.dc0);
    p.unprojected = at<T>(layer.unprojected, first, H);
    RNNLM_RETURN_IF_NOT_OK(
        launcher.template step<Gates>("launching a backward step of an LSTM", p));
  }
  return Status::ok();
}

// --- GRU -----------------------------------------------------------------------------------------

template <class T>
Status Stepwise<T>::gru_forward(const GruForward& layer, const CudaCall& call) {
  using namespace stepwise;
  using Gates = CellStep<T, GruAfterCell<T>>;
  using Reset = ResetStep<T>;
  using Candidate = CandidateStep<T>;
  const int64_t H = layer.hidden, B = layer.seq.batch;
  const ForwardSpace<T> space(call.workspace,
                              layer.reset_before ? Cell::gru_before : Cell::gru_after, B, H, 0);

  Launcher<T> launcher(call);
  RNNLM_RETURN_IF_NOT_OK(launcher.begin());
  RNNLM_RETURN_IF_NOT_OK(
      launcher.clear_padding(space.h[0], space.padded_bytes, space.h_stride != H));
  const T *h0, *w_hh;
  RNNLM_RETURN_IF_NOT_OK(launcher.readable(layer.h0, B, H, space.h0, &h0));
  RNNLM_RETURN_IF_NOT_OK(launcher.readable(layer.w_hh, 3 * H, H, space.w_hh, &w_hh));

  int turn = 0;
  for (StepCursor step(layer.seq, Pass::forward); step.now.rows > 0; step.advance(), turn ^= 1) {
    const int64_t first = step.now.first;
    const int rows = step.now.rows, carried = std::min(rows, step.before.rows);
    const StepOutput<T> out{space.h[turn ^ 1], space.h_stride, at<T>(layer.output, first, H),
                            static_cast<T*>(layer.h_n), std::min(rows, step.after.rows)};
    StepProduct<T> recurrent = product_of(w_hh, space.h[turn], H, space.h_stride, rows);
    recurrent.initial = h0;
    recurrent.carried = carried;
    const T* gates_x = at<const T>(layer.gates_x, first, 3 * H);
    const T* b_hh = static_cast<const T*>(layer.b_hh);
    const T* initial = static_cast<const T*>(layer.h0);
    if (!layer.reset_before) {
      typename Gates::Params p{};
      p.product = recurrent;
      p.rows = rows;
      p.out = out;
      p.gates_x = gates_x;
      p.b_hh = b_hh;
      p.initial = initial;
      p.state = space.state;
      p.saved = at<T>(layer.saved, first, 4 * H);
      RNNLM_RETURN_IF_NOT_OK(launcher.template step<Gates>("launching a forward step of a GRU", p));
      continue;
    }
    typename Reset::Params p{};
    p.product = recurrent;
    p.rows = rows;
    p.gates_x = gates_x;
    p.b_hh = b_hh;
    p.initial = initial;
    p.state = space.state;
    p.reset_h = space.inner;
    p.z = space.z;
    p.saved = at<T>(layer.saved, first, 3 * H);
    RNNLM_RETURN_IF_NOT_OK(launcher.template step<Reset>("launching the gates of a GRU step", p));
    typename Candidate::Params q{};
    q.product =
        product_of<T>(w_hh + 2 * H * space.h_stride, space.inner, H, space.inner_stride, rows);
    q.rows = rows;
    q.carried = carried;
    q.out = out;
    q.gates_x = gates_x;
    q.b_hh = b_hh;
    q.initial = initial;
    q.state = space.state;
    q.z = space.z;
    q.saved = p.saved;
    RNNLM_RETURN_IF_NOT_OK(
        launcher.template step<Candidate>("launching the candidate of a GRU step", q));
  }
  return Status::ok();
}

template <class T>
Status Stepwise<T>::gru_backward(const GruBackward& layer, const CudaCall& call) {
  using namespace stepwise;
  using After = GruBackwardStep<T, false>;
  using Before = GruBackwardStep<T, true>;
  using Reset = ResetBackwardStep<T>;
  const int64_t H = layer.hidden, B = layer.seq.batch;
  const bool wants_initial = layer.dh0 != nullptr;
  const BackwardSpace<T> space(call.workspace,
                               layer.reset_before ? Cell::gru_before : Cell::gru_after, B, H, 0);

  Launcher<T> launcher(call);
  RNNLM_RETURN_IF_NOT_OK(launcher.begin());
  RNNLM_RETURN_IF_NOT_OK(launcher.clear_padding(
      space.next[0], space.padded_bytes,
      space.next_stride != space.depth || space.inner_stride != space.inner_depth));
  const T* w_hh = static_cast<const T*>(layer.w_hh);
  RNNLM_RETURN_IF_NOT_OK(launcher.transpose(w_hh, space.depth, H, space.w_hh));
  if (layer.reset_before)
    RNNLM_RETURN_IF_NOT_OK(launcher.transpose(w_hh + 2 * H * H, H, H, space.w_inner));

  // What both variants' first launches share.
  const auto fill = [&](auto& p, const StepCursor& step, int turn) {
    const int64_t first = step.now.first;
    p.product = product_of<T>(space.w_hh, space.next[turn], H, space.next_stride, step.before.rows);
    p.rows = std::max(step.now.rows, step.before.rows);
    p.dh = {step.now.rows, static_cast<const T*>(layer.grad_h_n),
            at<const T>(layer.grad_output, first, H), static_cast<T*>(layer.dh0)};
    p.carried = std::min(step.now.rows, step.after.rows);
    p.output_before = at<const T>(layer.output, step.after.first, H);
    p.h0 = static_cast<const T*>(layer.h0);
    p.dgates = at<T>(layer.dgates, first, 3 * H);
    p.next = space.next[turn ^ 1];
    p.next_stride = space.next_stride;
    p.direct = space.kept;
  };

  int turn = 0;
  for (StepCursor step(layer.seq, Pass::backward);
       step.now.rows > 0 || (wants_initial && step.before.rows > 0); step.advance(), turn ^= 1) {
    const int64_t first = step.now.first;
    const int now = step.now.rows;
    if (!layer.reset_before) {
      typename After::Params p{};
      fill(p, step, turn);
      p.saved = at<const T>(layer.saved, first, 4 * H);
      p.candidate = at<T>(layer.candidate, first, H);
      RNNLM_RETURN_IF_NOT_OK(
          launcher.template step<After>("launching a backward step of a GRU", p));
      continue;
    }
    typename Before::Params p{};
    fill(p, step, turn);
    p.saved = at<const T>(layer.saved, first, 3 * H);
    p.next_n = space.inner;
    p.next_n_stride = space.inner_stride;
    RNNLM_RETURN_IF_NOT_OK(launcher.template step<Before>("launching a backward step of a GRU", p));
    if (now == 0) continue;
    typename Reset::Params q{};
    q.product = product_of<T>(space.w_inner, space.inner, H, space.inner_stride, now);
    q.rows = now;
    q.carried = p.carried;
    q.output_before = p.output_before;
    q.h0 = p.h0;
    q.saved = p.saved;
    q.dgates = p.dgates;
    q.candidate = at<T>(layer.candidate, first, H);
    q.next = p.next;
    q.next_stride = p.next_stride;
    q.direct = space.kept;
    RNNLM_RETURN_IF_NOT_OK(
        launcher.template step<Reset>("launching the reset gate of a backward step", q));
  }
  return Status::ok();
}

#undef RNNLM_RETURN_IF_NOT_OK

}  // namespace rnnlm
