#include "python/cpu.h"

#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

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
template <class Kernel, class... Args>
void call(Kernel cpu::Kernels::* kernel, const Args&... args) {
  const cpu::Choice& choice = cpu::choose();
  if (choice.error) raise_unless_ok(Status::invalid_argument(choice.error));
  cpu::Result result;
  {
    py::gil_scoped_release release;
    result = (choice.kernels.*kernel)(args...);
  }
  if (result == cpu::Result::out_of_memory)
    raise_unless_ok(Status::out_of_memory("no memory for the workspace of the CPU kernel",
                                          "Use a smaller batch or hidden size"));
}

LstmForward lstm_forward(int dtype, int threads, int64_t steps, int64_t batch, Address batch_sizes,
                         bool reverse, int64_t hidden, int64_t proj, int64_t input, Address x,
                         Address w_ih, Address b_ih, Address gates_x, Address w_hh, Address b_hh,
                         Address w_hr, Address h0, Address c0, Address output, Address h_n,
                         Address c_n, Address cells, Address saved) {
  return {DType(dtype),     threads,       sequence(steps, batch, batch_sizes, reverse),
          hidden,           proj,          projection(input, x, w_ih, b_ih),
          pointer(gates_x), pointer(w_hh), pointer(b_hh),
          pointer(w_hr),    pointer(h0),   pointer(c0),
          pointer(output),  pointer(h_n),  pointer(c_n),
          pointer(cells),   pointer(saved)};
}

LstmBackward lstm_backward(int dtype, int threads, int64_t steps, int64_t batch,
                           Address batch_sizes, bool reverse, int64_t hidden, int64_t proj,
                           Address grad_output, Address grad_h_n, Address grad_c_n,
                           Address grad_cells, Address w_hh, Address w_hr, Address c0,
                           Address cells, Address saved, Address dgates, Address dh0, Address dc0,
                           Address dproj, Address unprojected) {
  return {DType(dtype),
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
          pointer(unprojected)};
}

GruForward gru_forward(int dtype, int threads, int64_t steps, int64_t batch, Address batch_sizes,
                       bool reverse, int64_t hidden, bool reset_before, int64_t input, Address x,
                       Address w_ih, Address b_ih, Address gates_x, Address w_hh, Address b_hh,
                       Address h0, Address output, Address h_n, Address saved) {
  return {DType(dtype),     threads,         sequence(steps, batch, batch_sizes, reverse),
          hidden,           reset_before,    projection(input, x, w_ih, b_ih),
          pointer(gates_x), pointer(w_hh),   pointer(b_hh),
          pointer(h0),      pointer(output), pointer(h_n),
          pointer(saved)};
}

GruBackward gru_backward(int dtype, int threads, int64_t steps, int64_t batch, Address batch_sizes,
                         bool reverse, int64_t hidden, bool reset_before, Address grad_output,
                         Address grad_h_n, Address w_hh, Address h0, Address output, Address saved,
                         Address dgates, Address candidate, Address dh0) {
  return {DType(dtype),
          threads,
          sequence(steps, batch, batch_sizes, reverse),
          hidden,
          reset_before,
          pointer(grad_output),
          pointer(grad_h_n),
          pointer(w_hh),
          pointer(h0),
          pointer(output),
          pointer(saved),
          pointer(dgates),
          pointer(candidate),
          /*db=*/nullptr,
          pointer(dh0)};
}

Linear linear(int dtype, int threads, int64_t rows, int64_t input, int64_t units, Address x,
              Address w, Address out) {
  return {DType(dtype), threads, rows, input, units, pointer(x), pointer(w), pointer(out)};
}

LayerGradients layer_gradients(int dtype, int threads, int64_t steps, int64_t batch,
                               Address batch_sizes, bool reverse, int64_t rows, int64_t gates,
                               int64_t hidden, int64_t proj, int64_t input, bool reset_before,
                               double scale, bool accumulates, Address dgates, Address candidate,
                               Address dproj, Address unprojected, Address x, Address h0,
                               Address output, Address w_ih, Address dx, Address dw_ih,
                               Address dw_hh, Address dw_hr, Address db_ih, Address db_hh) {
  return {DType(dtype),
          threads,
          sequence(steps, batch, batch_sizes, reverse),
          rows,
          gates,
          hidden,
          proj,
          input,
          reset_before,
          scale,
          accumulates,
          pointer(dgates),
          pointer(candidate),
          pointer(dproj),
          pointer(unprojected),
          pointer(x),
          pointer(h0),
          pointer(output),
          pointer(w_ih),
          pointer(dx),
          pointer(dw_ih),
          pointer(dw_hh),
          pointer(dw_hr),
          pointer(db_ih),
          pointer(db_hh)};
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

void dropout(int dtype, int threads, int64_t count, uint64_t seed, float p, double scale, Address x,
             Address y) {
  call(&cpu::Kernels::dropout,
       Dropout{DType(dtype), threads, count, seed, p, scale, pointer(x), pointer(y)});
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

// NAME(*problem) runs one problem, NAME_pair(problem, problem) two (see cpu/kernels.h).
template <class Params, class... Args>
void bind(py::module_& m, const std::string& name, cpu::LayerKernel<Params> cpu::Kernels::* kernel,
          Params (*describe)(Args...)) {
  m.def(name.c_str(), [=](Args... args) {
    const Params problem = describe(args...);
    call(kernel, &problem, 1);
  });
  using Arguments = std::tuple<Args...>;
  m.def((name + "_pair").c_str(), [=](const Arguments& first, const Arguments& second) {
    const Params problems[] = {std::apply(describe, first), std::apply(describe, second)};
    call(kernel, problems, 2);
  });
}

// NAME_stack([problem, ...]) runs layers each of which reads the output of the one before.
template <class Params, class... Args>
void bind_stack(py::module_& m, const std::string& name,
                cpu::LayerKernel<Params> cpu::Kernels::* kernel, Params (*describe)(Args...)) {
  m.def((name + "_stack").c_str(), [=](const std::vector<std::tuple<Args...>>& layers) {
    std::vector<Params> problems;
    for (const auto& layer : layers) {
      Params problem = std::apply(describe, layer);
      if (!problems.empty()) {
        if (problem.projection.x != problems.back().output)
          raise_unless_ok(Status::invalid_argument("a layer does not read the one before"));
        problem.projection.follows = true;
      }
      problems.push_back(problem);
    }
    if (!problems.empty()) call(kernel, problems.data(), int(problems.size()));
  });
}

bool side_by_side(int threads, std::tuple<int, int64_t, int64_t> first,
                  std::tuple<int, int64_t, int64_t> second) {
  const auto demand = [](const auto& d) {
    return cpu::Demand{std::get<0>(d), std::get<1>(d), std::get<2>(d)};
  };
  return cpu::side_by_side(threads, demand(first), demand(second));
}

int layers_at_once(int threads, int layers, int64_t steps, std::tuple<int, int64_t, int64_t> most) {
  return cpu::layers_at_once(threads, layers, steps,
                             {std::get<0>(most), std::get<1>(most), std::get<2>(most)});
}

std::vector<std::pair<int, int>> crews(int came, const std::vector<int>& asked) {
  std::vector<cpu::Crew> crews(asked.size());
  cpu::divide(came, asked.data(), int(asked.size()), crews.data());
  std::vector<std::pair<int, int>> found;
  for (const cpu::Crew& crew : crews) found.emplace_back(crew.begin, crew.size);
  return found;
}

std::vector<std::pair<int64_t, int64_t>> row_groups(const std::vector<int64_t>& batch_sizes,
                                                    int groups) {
  std::vector<std::pair<int64_t, int64_t>> found;
  for (int group = 0; group < groups; ++group) {
    const cpu::Rows rows = cpu::rows_of_group(batch_sizes.data(), int64_t(batch_sizes.size()),
                                              batch_sizes.at(0), group, groups);
    found.emplace_back(rows.begin, rows.end);
  }
  return found;
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
  m.def(
      "cpu_products_pay", [] { return cpu::choose().products_pay; },
      "Whether cpu_linear and cpu_layer_gradients are faster than the products of torch's "
      "libraries, by what was measured on CPUs like this one.");
  bind(m, "cpu_lstm_forward", &cpu::Kernels::lstm_forward, &lstm_forward);
  bind(m, "cpu_lstm_backward", &cpu::Kernels::lstm_backward, &lstm_backward);
  bind(m, "cpu_gru_forward", &cpu::Kernels::gru_forward, &gru_forward);
  bind_stack(m, "cpu_lstm_forward", &cpu::Kernels::lstm_forward, &lstm_forward);
  bind_stack(m, "cpu_gru_forward", &cpu::Kernels::gru_forward, &gru_forward);
  bind(m, "cpu_gru_backward", &cpu::Kernels::gru_backward, &gru_backward);
  bind(m, "cpu_linear", &cpu::Kernels::linear, &linear);
  bind(m, "cpu_layer_gradients", &cpu::Kernels::layer_gradients, &layer_gradients);
  m.def("cpu_cross_entropy", &cross_entropy);
  m.def("cpu_dropout", &dropout);
  m.def("cpu_side_by_side", &side_by_side,
        "Whether a team runs two problems of (threads, caches, work) side by side; for tests.");
  m.def("cpu_layers_at_once", &layers_at_once,
        "How many layers of a stack a team runs at a time, by threads, layers, steps and (threads, "
        "caches, work) of a layer; for tests.");
  m.def("cpu_crews", &crews,
        "(begin, size) of the threads of each crew, of those that came and those that every crew "
        "asked for; for tests.");
  m.def("cpu_row_groups", &row_groups,
        "(begin, end) of the rows of each group of threads, of a batch of sequences; for tests.");
  m.def("cpu_elementwise", &elementwise,
        "y = f(x) of n values by the kernels' own exp, sigmoid or tanh; for tests.");
}

}  // namespace rnnlm
