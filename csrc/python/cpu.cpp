#include "python/cpu.h"

#include <string>

#include "core/params.h"
#include "core/status.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "python/errors.h"

namespace py = pybind11;

namespace rnnlm {
namespace {

using Address = std::uintptr_t;  // of a tensor's first element; 0 for None

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Sequence sequence(int64_t steps, int64_t batch, Address batch_sizes, bool reverse) {
  return {steps, batch, pointer<const int64_t>(batch_sizes), reverse};
}

Projection projection(int64_t input, Address x, Address w_ih, Address b_ih) {
  return {input, pointer(x), pointer(w_ih), pointer(b_ih)};
}

// Runs without the GIL; the operators have checked every size, dtype and pointer.
template <class Params>
void call(cpu::Result (*cpu::Kernels::*kernel)(const Params&), const Params& params) {
  const cpu::Choice& choice = cpu::choose();
  if (choice.error) raise_unless_ok(Status::invalid_argument(choice.error));
  cpu::Result result;
  {
    py::gil_scoped_release release;
    result = (choice.kernels.*kernel)(params);
  }
  if (result == cpu::Result::out_of_memory)
    raise_unless_ok(Status::out_of_memory("no memory for the workspace of the CPU kernel",
                                          "Use a smaller batch or hidden size"));
}

void lstm_forward(int dtype, int threads, int64_t steps, int64_t batch, Address batch_sizes,
                  bool reverse, int64_t hidden, int64_t proj, int64_t input, Address x,
                  Address w_ih, Address b_ih, Address gates_x, Address w_hh, Address b_hh,
                  Address w_hr, Address h0, Address c0, Address output, Address h_n, Address c_n,
                  Address cells, Address saved) {
  call(&cpu::Kernels::lstm_forward,
       LstmForward{DType(dtype), threads, sequence(steps, batch, batch_sizes, reverse), hidden,
                   proj, projection(input, x, w_ih, b_ih), pointer(gates_x), pointer(w_hh),
                   pointer(b_hh), pointer(w_hr), pointer(h0), pointer(c0), pointer(output),
                   pointer(h_n), pointer(c_n), pointer(cells), pointer(saved)});
}

void lstm_backward(int dtype, int threads, int64_t steps, int64_t batch, Address batch_sizes,
                   bool reverse, int64_t hidden, int64_t proj, Address grad_output,
                   Address grad_h_n, Address grad_c_n, Address grad_cells, Address w_hh,
                   Address w_hr, Address c0, Address cells, Address saved, Address dgates,
                   Address dh0, Address dc0, Address dproj, Address unprojected) {
  call(&cpu::Kernels::lstm_backward, LstmBackward{DType(dtype),
                                                  threads,
                                                  sequence(steps, batch, batch_sizes, reverse),
                                                  hidden,
                                                  proj,
                                                  pointer(grad_output),
                                                  pointer(grad_h_n),
                                                  pointer(grad_c_n),
                                                  pointer(grad_cells),
                                                  pointer(w_hh),
                                                  pointer(w_hr),
                                                  pointer(c0),
                                                  pointer(cells),
                                                  pointer(saved),
                                                  pointer(dgates),
                                                  /*db=*/nullptr,
                                                  pointer(dh0),
                                                  pointer(dc0),
                                                  pointer(dproj),
                                                  pointer(unprojected)});
}

void gru_forward(int dtype, int threads, int64_t steps, int64_t batch, Address batch_sizes,
                 bool reverse, int64_t hidden, bool reset_before, int64_t input, Address x,
                 Address w_ih, Address b_ih, Address gates_x, Address w_hh, Address b_hh,
                 Address h0, Address output, Address h_n, Address saved) {
  call(&cpu::Kernels::gru_forward,
       GruForward{DType(dtype), threads, sequence(steps, batch, batch_sizes, reverse), hidden,
                  reset_before, projection(input, x, w_ih, b_ih), pointer(gates_x), pointer(w_hh),
                  pointer(b_hh), pointer(h0), pointer(output), pointer(h_n), pointer(saved)});
}

void gru_backward(int dtype, int threads, int64_t steps, int64_t batch, Address batch_sizes,
                  bool reverse, int64_t hidden, bool reset_before, Address grad_output,
                  Address grad_h_n, Address w_hh, Address h0, Address output, Address saved,
                  Address dgates, Address candidate, Address dh0) {
  call(&cpu::Kernels::gru_backward,
       GruBackward{DType(dtype), threads, sequence(steps, batch, batch_sizes, reverse), hidden,
                   reset_before, pointer(grad_output), pointer(grad_h_n), pointer(w_hh),
                   pointer(h0), pointer(output), pointer(saved), pointer(dgates),
                   pointer(candidate), /*db=*/nullptr, pointer(dh0)});
}

void cross_entropy(int dtype, int threads, int64_t rows, int64_t classes, Address logits,
                   Address bias, Address target, Address class_weight, double class_weight_sum,
                   int64_t ignore_index, double label_smoothing, Address upstream, bool gradient,
                   Address losses, Address bias_grad) {
  call(&cpu::Kernels::cross_entropy,
       CrossEntropy{DType(dtype), threads, rows, classes, pointer(logits), pointer(bias),
                    pointer<const int64_t>(target), pointer(class_weight), class_weight_sum,
                    ignore_index, label_smoothing, pointer(upstream), gradient, pointer(losses),
                    pointer(bias_grad)});
}

void elementwise(const std::string& function, int dtype, int64_t n, Address x, Address y) {
  const int code = function == "exp" ? 0 : function == "sigmoid" ? 1 : function == "tanh" ? 2 : -1;
  if (code < 0 || (DType(dtype) != DType::f32 && DType(dtype) != DType::f64))
    raise_unless_ok(
        Status::invalid_argument("elementwise knows exp, sigmoid and tanh of float32 "
                                 "and float64"));
  const cpu::Choice& choice = cpu::choose();
  if (choice.error) raise_unless_ok(Status::invalid_argument(choice.error));
  choice.kernels.elementwise(code, DType(dtype), n, pointer(x), pointer(y));
}

py::dict info() {
  const cpu::Choice& choice = cpu::choose();
  if (choice.error) raise_unless_ok(Status::invalid_argument(choice.error));
  py::dict info;
  info["isa"] = choice.kernels.isa;
  info["threads_from"] = cpu::parallel_runtime();
  return info;
}

}  // namespace

void bind_cpu(py::module_& m) {
  m.def("cpu_info", &info,
        "What the CPU kernels use: isa (RNNLM_CPU_ISA overrides), threads_from (runtime whose "
        "threads they run on).\n\nRaises ValueError when RNNLM_CPU_ISA names what is not there.");
  m.def("cpu_lstm_forward", &lstm_forward);
  m.def("cpu_lstm_backward", &lstm_backward);
  m.def("cpu_gru_forward", &gru_forward);
  m.def("cpu_gru_backward", &gru_backward);
  m.def("cpu_cross_entropy", &cross_entropy);
  m.def("cpu_elementwise", &elementwise,
        "y = f(x) of n values by the kernels' own exp, sigmoid or tanh; for tests.");
}

}  // namespace rnnlm
