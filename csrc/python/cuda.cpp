#include "python/cuda.h"

#include <string>

#include "core/params.h"
#include "core/status.h"
#include "launch/layers.h"
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

// Enqueues without the GIL; returns the number of the tier that runs the layer.
template <class Layer>
int run(Status (*function)(const Layer&, const CudaCall&, CudaTier*), const Layer& layer,
        const CudaCall& call) {
  CudaTier ran = CudaTier::automatic;
  Status status;
  {
    py::gil_scoped_release release;
    status = function(layer, call, &ran);
  }
  raise_unless_ok(status);
  return static_cast<int>(ran);
}

int lstm_forward(int dtype, int64_t steps, int64_t batch, Address batch_sizes, bool reverse,
                 int64_t hidden, int64_t proj, Address gates_x, Address w_hh, Address b_hh,
                 Address w_hr, Address h0, Address c0, Address output, Address h_n, Address c_n,
                 Address cells, Address saved, int device, Address stream, Address offsets,
                 Address workspace, int64_t workspace_bytes, int tier, bool allow_tf32,
                 int concurrent) {
  return run(&cuda_lstm_forward,
             LstmForward{DType(dtype), 0, sequence(steps, batch, batch_sizes, reverse), hidden,
                         proj, Projection{}, pointer(gates_x), pointer(w_hh), pointer(b_hh),
                         pointer(w_hr), pointer(h0), pointer(c0), pointer(output), pointer(h_n),
                         pointer(c_n), pointer(cells), pointer(saved)},
             CudaCall{device, stream, pointer<const int64_t>(offsets), pointer(workspace),
                      workspace_bytes, CudaTier(tier), allow_tf32, concurrent});
}

int lstm_backward(int dtype, int64_t steps, int64_t batch, Address batch_sizes, bool reverse,
                  int64_t hidden, int64_t proj, Address grad_output, Address grad_h_n,
                  Address grad_c_n, Address grad_cells, Address w_hh, Address w_hr, Address c0,
                  Address cells, Address saved, Address dgates, Address db, Address dh0,
                  Address dc0, Address dproj, Address unprojected, int device, Address stream,
                  Address offsets, Address workspace, int64_t workspace_bytes, int tier,
                  bool allow_tf32, int concurrent) {
  return run(&cuda_lstm_backward,
             LstmBackward{DType(dtype),
                          0,
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
                          pointer(db),
                          pointer(dh0),
                          pointer(dc0),
                          pointer(dproj),
                          pointer(unprojected)},
             CudaCall{device, stream, pointer<const int64_t>(offsets), pointer(workspace),
                      workspace_bytes, CudaTier(tier), allow_tf32, concurrent});
}

int gru_forward(int dtype, int64_t steps, int64_t batch, Address batch_sizes, bool reverse,
                int64_t hidden, bool reset_before, Address gates_x, Address w_hh, Address b_hh,
                Address h0, Address output, Address h_n, Address saved, int device, Address stream,
                Address offsets, Address workspace, int64_t workspace_bytes, int tier,
                bool allow_tf32, int concurrent) {
  return run(&cuda_gru_forward,
             GruForward{DType(dtype), 0, sequence(steps, batch, batch_sizes, reverse), hidden,
                        reset_before, Projection{}, pointer(gates_x), pointer(w_hh), pointer(b_hh),
                        pointer(h0), pointer(output), pointer(h_n), pointer(saved)},
             CudaCall{device, stream, pointer<const int64_t>(offsets), pointer(workspace),
                      workspace_bytes, CudaTier(tier), allow_tf32, concurrent});
}

int gru_backward(int dtype, int64_t steps, int64_t batch, Address batch_sizes, bool reverse,
                 int64_t hidden, bool reset_before, Address grad_output, Address grad_h_n,
                 Address w_hh, Address h0, Address output, Address saved, Address dgates,
                 Address candidate, Address db, Address dh0, int device, Address stream,
                 Address offsets, Address workspace, int64_t workspace_bytes, int tier,
                 bool allow_tf32, int concurrent) {
  return run(&cuda_gru_backward,
             GruBackward{DType(dtype), 0, sequence(steps, batch, batch_sizes, reverse), hidden,
                         reset_before, pointer(grad_output), pointer(grad_h_n), pointer(w_hh),
                         pointer(h0), pointer(output), pointer(saved), pointer(dgates),
                         pointer(candidate), pointer(db), pointer(dh0)},
             CudaCall{device, stream, pointer<const int64_t>(offsets), pointer(workspace),
                      workspace_bytes, CudaTier(tier), allow_tf32, concurrent});
}

py::tuple needs(int cell, int pass, int dtype, int64_t steps, int64_t batch, int64_t hidden,
                int64_t proj, int64_t rows, bool packed, bool allow_tf32, int device, int tier,
                int concurrent) {
  CudaNeeds needs{};
  raise_unless_ok(cuda_needs({Cell(cell), Pass(pass), DType(dtype), steps, batch, hidden, proj,
                              rows, packed, allow_tf32, concurrent},
                             device, CudaTier(tier), &needs));
  return py::make_tuple(needs.workspace, needs.offsets);
}

Address new_stream(int device, Address like) {
  Address stream = 0;
  raise_unless_ok(cuda_new_stream(device, like, &stream));
  return stream;
}

py::dict device_limits(int device) {
  DeviceLimits limits;
  raise_unless_ok(cuda_device_limits(device, &limits));
  py::dict off;
  for (int tier = 0; tier < kCudaTiers; ++tier) {
    if (limits.off[tier]) off[tier_name(CudaTier(tier))] = cuda_why_off(device, CudaTier(tier));
  }
  py::dict result;
  result["compute_capability"] = limits.compute_capability;
  result["sms"] = limits.sms;
  result["shared_per_block"] = limits.shared_per_block;
  result["cooperative"] = limits.cooperative;
  result["off"] = off;
  return result;
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_lstm_forward", &lstm_forward);
  m.def("cuda_lstm_backward", &lstm_backward);
  m.def("cuda_gru_forward", &gru_forward);
  m.def("cuda_gru_backward", &gru_backward);
  m.def("cuda_needs", &needs, py::arg("cell"), py::arg("backward"), py::arg("dtype"),
        py::arg("steps"), py::arg("batch"), py::arg("hidden"), py::arg("proj"), py::arg("rows"),
        py::arg("packed"), py::arg("allow_tf32"), py::arg("device"), py::arg("tier"),
        py::arg("concurrent"),
        "What a call on a device has to bring: bytes of workspace, and whether the offsets of a "
        "packed sequence. Arguments as of cuda_plan. Raises NotImplementedError where the tier "
        "cannot run the layer.");
  m.def("cuda_device_limits", &device_limits, py::arg("device"),
        "What a plan depends on of a device: compute_capability (90 for 9.0), sms, "
        "shared_per_block (bytes), cooperative, and off: tiers that failed on it, with the cause.");
  m.def("cuda_new_stream", &new_stream, py::arg("device"), py::arg("like"),
        "A new stream (its address) of the device, with the priority of another. Never destroyed.");
  m.def("cuda_take_failure", &cuda_take_failure, py::arg("device"),
        "What became of a persistent launch that gave up waiting since the last call: a sentence, "
        "or \"\". Takes the failure that the next layer on the device would raise. Synchronise "
        "first to hear of everything enqueued so far.");
  m.def("cuda_set_wait_limit", &cuda_set_wait_limit, py::arg("polls"), py::arg("nanoseconds"),
        "For tests: how many polls and how long a persistent launch waits at least before it gives "
        "up.");
  m.def("cuda_forget_devices", &cuda_forget_devices,
        "For tests: forgets limits, failures and the wait limit.");
}

}  // namespace rnnlm
