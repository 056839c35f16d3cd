#include <string>

#include "core/params.h"
#include "launch/plan.h"
#include "python/cuda.h"
#include "python/errors.h"

namespace py = pybind11;

namespace rnnlm {
namespace {

constexpr CudaTier kTiers[] = {CudaTier::stepwise, CudaTier::block, CudaTier::cluster,
                               CudaTier::grid};

DeviceLimits limits_of(const py::dict& device) {
  DeviceLimits limits;
  limits.compute_capability = device["compute_capability"].cast<int>();
  limits.sms = device["sms"].cast<int>();
  limits.shared_per_block = device["shared_per_block"].cast<std::size_t>();
  limits.cooperative = device["cooperative"].cast<bool>();
  if (device.contains("off")) {
    const py::dict off = device["off"];
    for (const CudaTier tier : kTiers)
      limits.off[static_cast<int>(tier)] = off.contains(tier_name(tier));
  }
  return limits;
}

py::dict plan(int cell, int pass, int dtype, int64_t steps, int64_t batch, int64_t hidden,
              int64_t proj, int64_t rows, bool packed, bool allow_tf32, const py::dict& device,
              int tier) {
  const CudaProblem problem{Cell(cell), Pass(pass), DType(dtype), steps,  batch,
                            hidden,     proj,       rows,         packed, allow_tf32};
  if (steps < 1 || batch < 1 || hidden < 1)
    raise_unless_ok(Status::invalid_argument("steps, batch and hidden should be 1 or more"));
  const CudaChoice choice = choose(problem, limits_of(device), CudaTier(tier));
  py::dict forecasts;
  for (const CudaTier one : kTiers) {
    const Forecast& forecast = choice.of(one);
    py::dict entry;
    entry["able"] = forecast.able;
    entry["obstacle"] = forecast.obstacle;
    entry["us_per_step"] = forecast.us_per_step;
    entry["us_per_call"] = forecast.us_per_call;
    forecasts[tier_name(one)] = entry;
  }
  py::dict result;
  result["tier"] =
      choice.tier == CudaTier::automatic ? py::object(py::none()) : py::str(tier_name(choice.tier));
  result["shape"] = describe(choice);
  result["forecasts"] = forecasts;
  if (choice.tier == CudaTier::grid) {
    const GridPlan& grid = choice.grid;
    py::dict shape;
    shape["fragments"] = grid.fragments;
    shape["tiles"] = grid.tiles;
    shape["ctas"] = grid.ctas;
    shape["groups"] = grid.groups;
    shape["rows"] = grid.rows;
    result["grid"] = shape;
  }
  if (choice.tier == CudaTier::block || choice.tier == CudaTier::cluster) {
    const ClusterPlan& cluster = choice.cluster;
    py::dict shape;
    shape["ctas"] = cluster.ctas;
    shape["clusters"] = cluster.clusters;
    shape["rows"] = cluster.rows;
    result[tier_name(choice.tier)] = shape;
  }
  return result;
}

}  // namespace

void bind_plan(py::module_& m) {
  m.def("cuda_plan", &plan, py::arg("cell"), py::arg("backward"), py::arg("dtype"),
        py::arg("steps"), py::arg("batch"), py::arg("hidden"), py::arg("proj"), py::arg("rows"),
        py::arg("packed"), py::arg("allow_tf32"), py::arg("device"), py::arg("tier"),
        "How a layer would run on a device like `device` (a dict as cuda_device_limits returns "
        "it): tier (None: the tier asked for cannot), shape (in words), its numbers under the "
        "tier's name, and forecasts: of each tier whether it is able, its obstacle, us_per_step "
        "and us_per_call.\n\n"
        "cell: 0 LSTM, 1 GRU with reset after, 2 GRU with reset before. rows: of all steps "
        "together. dtype and tier: as in "
        "csrc/core/params.h. The times are derived (csrc/launch/cost_model.h), not measured.");
}

}  // namespace rnnlm
