// Runs the CPU kernels in a process of their own, compiled for any CPU that an emulator runs. Tests
// talk to it through pipes (tests/cpu_driver.py): it reads a call from standard input, runs it,
// writes an answer to standard output, and ends with its input. Its arguments are libraries to load
// first. Numbers are as they lie in memory.
//
//   call:    name of the kernel; buffers; problems (one, or two that run together)
//   buffer:  its bytes
//   problem: numbers by name (double), then tensors by name (index of their buffer)
//   answer:  what went wrong, or ""; a word on this process; the buffers as they are now
//
// A list begins with its length, in 64 bits, and so do a name and the bytes of a buffer.
//
// Each buffer ends where a page begins that nobody may touch: a kernel that reads or writes past a
// tensor ends this process. A kernel finds NaN wherever it has not written in its workspace.

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/params.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace rnnlm {
namespace {

[[noreturn]] void give_up(const char* what) {
  std::fprintf(stderr, "cpu_driver: %s\n", what);
  std::exit(2);
}

template <class T>
bool read_all(T* data, size_t count) {
  return std::fread(data, sizeof(T), count, stdin) == count;
}
template <class T>
T read() {
  T value;
  if (!read_all(&value, 1)) give_up("the call ends too early");
  return value;
}
std::string read_text() {
  std::string text(size_t(read<int64_t>()), '\0');
  if (!read_all(text.data(), text.size())) give_up("the call ends too early");
  return text;
}
void write(const void* data, size_t bytes) {
  if (std::fwrite(data, 1, bytes, stdout) != bytes) give_up("nobody reads the answer");
}
void write_text(const std::string& text) {
  const int64_t length = int64_t(text.size());
  write(&length, sizeof length);
  write(text.data(), text.size());
}

class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const size_t room = (bytes + page - 1) / page * page;
    mapped_ = room + 2 * page;
    void* pages = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) give_up("no memory for a buffer");
    pages_ = static_cast<char*>(pages);
    if (room && mprotect(pages_ + page, room, PROT_READ | PROT_WRITE) != 0)
      give_up("no memory for a buffer");
    data_ = pages_ + page + room - bytes;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { munmap(pages_, mapped_); }

  char* data() { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_, mapped_;
  char *pages_, *data_;
};
using Buffers = std::vector<std::unique_ptr<Buffer>>;

// What a problem's struct is filled from. A tensor that the call does not name is null.
class Problem {
 public:
  explicit Problem(const Buffers& buffers) {
    for (int64_t n = read<int64_t>(); n > 0; --n) {
      const std::string name = read_text();
      numbers_[name] = read<double>();
    }
    for (int64_t n = read<int64_t>(); n > 0; --n) {
      const std::string name = read_text();
      tensors_[name] = buffers.at(size_t(read<int64_t>()))->data();
    }
  }
  double real(const char* name) const {
    const auto found = numbers_.find(name);
    if (found == numbers_.end()) give_up((std::string("no number ") + name).c_str());
    return found->second;
  }
  int64_t number(const char* name) const { return int64_t(real(name)); }
  template <class T = void>
  T* tensor(const char* name) const {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? nullptr : reinterpret_cast<T*>(found->second);
  }

  DType dtype() const { return DType(number("dtype")); }
  Sequence sequence() const {
    return {number("T"), number("B"), tensor<const int64_t>("batch_sizes"), number("reverse") != 0};
  }
  Projection projection() const {
    return {number("I"), tensor("x"), tensor("w_ih"), tensor("b_ih")};
  }

 private:
  std::map<std::string, double> numbers_;
  std::map<std::string, char*> tensors_;
};

// What a problem of each kind has.
template <class Params>
Params recurrence(const Problem& from) {
  Params p{};
  p.dtype = from.dtype();
  p.threads = int(from.number("threads"));
  p.seq = from.sequence();
  p.hidden = from.number("H");
  p.w_hh = from.tensor("w_hh");
  return p;
}

void describe(const Problem& from, LstmForward& p) {
  p = recurrence<LstmForward>(from);
  p.proj = from.number("P");
  p.projection = from.projection();
  p.gates_x = from.tensor("gates_x");
  p.b_hh = from.tensor("b_hh");
  p.w_hr = from.tensor("w_hr");
  p.h0 = from.tensor("h0");
  p.c0 = from.tensor("c0");
  p.output = from.tensor("output");
  p.h_n = from.tensor("h_n");
  p.c_n = from.tensor("c_n");
  p.cells = from.tensor("cells");
  p.saved = from.tensor("saved");
}

void describe(const Problem& from, LstmBackward& p) {
  p = recurrence<LstmBackward>(from);
  p.proj = from.number("P");
  p.grad_output = from.tensor("grad_output");
  p.grad_h_n = from.tensor("grad_h_n");
  p.grad_c_n = from.tensor("grad_c_n");
  p.grad_cells = from.tensor("grad_cells");
  p.w_hr = from.tensor("w_hr");
  p.c0 = from.tensor("c0");
  p.cells = from.tensor("cells");
  p.saved = from.tensor("saved");
  p.dgates = from.tensor("dgates");
  p.dh0 = from.tensor("dh0");
  p.dc0 = from.tensor("dc0");
  p.dproj = from.tensor("dproj");
  p.unprojected = from.tensor("unprojected");
}

void describe(const Problem& from, GruForward& p) {
  p = recurrence<GruForward>(from);
  p.reset_before = from.number("reset_before") != 0;
  p.projection = from.projection();
  p.gates_x = from.tensor("gates_x");
  p.b_hh = from.tensor("b_hh");
  p.h0 = from.tensor("h0");
  p.output = from.tensor("output");
  p.h_n = from.tensor("h_n");
  p.saved = from.tensor("saved");
}

void describe(const Problem& from, GruBackward& p) {
  p = recurrence<GruBackward>(from);
  p.reset_before = from.number("reset_before") != 0;
  p.grad_output = from.tensor("grad_output");
  p.grad_h_n = from.tensor("grad_h_n");
  p.h0 = from.tensor("h0");
  p.output = from.tensor("output");
  p.saved = from.tensor("saved");
  p.dgates = from.tensor("dgates");
  p.candidate = from.tensor("candidate");
  p.dh0 = from.tensor("dh0");
}

void describe(const Problem& from, Linear& p) {
  p.dtype = from.dtype();
  p.threads = int(from.number("threads"));
  p.rows = from.number("N");
  p.input = from.number("I");
  p.units = from.number("V");
  p.x = from.tensor("x");
  p.w = from.tensor("w");
  p.out = from.tensor("out");
}

void describe(const Problem& from, LayerGradients& p) {
  p.dtype = from.dtype();
  p.threads = int(from.number("threads"));
  p.seq = from.sequence();
  p.rows = from.number("N");
  p.gates = from.number("G");
  p.hidden = from.number("H");
  p.proj = from.number("P");
  p.input = from.number("I");
  p.reset_before = from.number("reset_before") != 0;
  p.scale = from.real("scale");
  p.accumulates = from.number("accumulates") != 0;
  p.dgates = from.tensor("dgates");
  p.candidate = from.tensor("candidate");
  p.dproj = from.tensor("dproj");
  p.unprojected = from.tensor("unprojected");
  p.x = from.tensor("x");
  p.h0 = from.tensor("h0");
  p.output = from.tensor("output");
  p.w_ih = from.tensor("w_ih");
  p.dx = from.tensor("dx");
  p.dw_ih = from.tensor("dw_ih");
  p.dw_hh = from.tensor("dw_hh");
  p.dw_hr = from.tensor("dw_hr");
  p.db_ih = from.tensor("db_ih");
  p.db_hh = from.tensor("db_hh");
}

CrossEntropy cross_entropy(const Problem& from) {
  CrossEntropy p{};
  p.dtype = from.dtype();
  p.threads = int(from.number("threads"));
  p.rows = from.number("N");
  p.classes = from.number("V");
  p.logits = from.tensor("logits");
  p.bias = from.tensor("bias");
  p.target = from.tensor<const int64_t>("target");
  p.class_weight = from.tensor("class_weight");
  p.class_weight_sum = from.real("class_weight_sum");
  p.ignore_index = from.number("ignore_index");
  p.label_smoothing = from.real("label_smoothing");
  p.upstream = from.tensor("upstream");
  p.gradient = from.number("gradient") != 0;
  p.losses = from.tensor("losses");
  p.bias_grad = from.tensor("bias_grad");
  return p;
}

Dropout dropout(const Problem& from) {
  return {from.dtype(),          int(from.number("threads")),
          from.number("N"),      uint64_t(from.number("seed")),
          float(from.real("p")), from.real("scale"),
          from.tensor("x"),      from.tensor("y")};
}

template <class Params>
cpu::Result run(cpu::LayerKernel<Params> kernel, const std::vector<Problem>& problems) {
  std::vector<Params> params(problems.size());
  for (size_t i = 0; i < problems.size(); ++i) describe(problems[i], params[i]);
  return kernel(params.data(), int(params.size()));
}

#if defined(RNNLM_EMULATED_AMX)
// isa.cpp asks the CPU, which need not have them.
cpu::Choice choose() {
  return {cpu::amx::kernels(), nullptr};
}
void check_tiles() {
  if (emulated::threads_with_tiles()) give_up("a thread has not released its tiles");
}
#else
using cpu::choose;
void check_tiles() {}
#endif

void spoil_workspace() {
  constexpr size_t kBytes = size_t(4) << 20;
  if (void* memory = cpu::workspace(kBytes)) std::memset(memory, 0xff, kBytes);
}

cpu::Result run(const cpu::Kernels& kernels, const std::string& name,
                const std::vector<Problem>& problems) {
  if (name == "info") return cpu::Result::ok;
  if (name == "lstm_forward") return run(kernels.lstm_forward, problems);
  if (name == "lstm_backward") return run(kernels.lstm_backward, problems);
  if (name == "gru_forward") return run(kernels.gru_forward, problems);
  if (name == "gru_backward") return run(kernels.gru_backward, problems);
  if (name == "linear") return run(kernels.linear, problems);
  if (name == "layer_gradients") return run(kernels.layer_gradients, problems);
  const Problem& problem = problems.at(0);
  if (name == "cross_entropy") return kernels.cross_entropy(cross_entropy(problem));
  if (name == "dropout") return kernels.dropout(dropout(problem));
  if (name != "elementwise") give_up("no such kernel");
  kernels.elementwise(int(problem.number("function")), problem.dtype(), problem.number("N"),
                      problem.tensor("x"), problem.tensor("y"));
  return cpu::Result::ok;
}

void answer(const std::string& name) {
  Buffers buffers;
  for (int64_t n = read<int64_t>(); n > 0; --n) {
    buffers.push_back(std::make_unique<Buffer>(size_t(read<int64_t>())));
    if (!read_all(buffers.back()->data(), buffers.back()->bytes()))
      give_up("the call ends too early");
  }
  std::vector<Problem> problems;
  for (int64_t n = read<int64_t>(); n > 0; --n) problems.emplace_back(buffers);

  spoil_workspace();
  const cpu::Choice& choice = choose();
  std::string error = choice.error ? choice.error : "";
  if (error.empty() && run(choice.kernels, name, problems) != cpu::Result::ok)
    error = "out of memory";
  check_tiles();
  write_text(error);
  write_text(choice.kernels.isa + std::string(" ") + cpu::parallel_runtime());
  for (const auto& buffer : buffers) write(buffer->data(), buffer->bytes());
  std::fflush(stdout);
}

}  // namespace

#if defined(RNNLM_EMULATED_AMX)
// Whatever is not bfloat16 "amx" leaves to these. They would take long to compile for nothing new.
cpu::Kernels cpu::avx512::kernels() {
  return {};
}
#endif

}  // namespace rnnlm

int main(int count, char** arguments) {
  for (int i = 1; i < count; ++i)
    if (!dlopen(arguments[i], RTLD_NOW | RTLD_GLOBAL)) rnnlm::give_up(dlerror());
  int64_t length;
  while (rnnlm::read_all(&length, 1)) {
    std::string name(size_t(length), '\0');
    if (!rnnlm::read_all(name.data(), name.size())) rnnlm::give_up("the call ends too early");
    rnnlm::answer(name);
  }
}
