#include <string>

#include "core/params.h"
#include "launch/plan.h"
#include "python/cuda.h"
#include "python/errors.h"

namespace py = pybind11;

namespace rnnlm {
namespace {

constexpr CudaTier kTiers[] = {CudaTier::stepwise, CudaTier::block, CudaTier::cluster,
                               CudaTier::grid, CudaTier::grid_pairs};

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

void check(const CudaProblem& problem) {
  if (problem.steps < 1 || problem.batch < 1 || problem.hidden < 1)
    raise_unless_ok(Status::invalid_argument("steps, batch and hidden should be 1 or more"));
  if (problem.concurrent < 1)
    raise_unless_ok(Status::invalid_argument("concurrent should be 1 or more"));
}

py::dict plan(int cell, int pass, int dtype, int64_t steps, int64_t batch, int64_t hidden,
              int64_t proj, int64_t rows, bool packed, bool allow_tf32, const py::dict& device,
              int tier, int concurrent) {
  const CudaProblem problem{Cell(cell), Pass(pass), DType(dtype), steps,      batch,     hidden,
                            proj,       rows,       packed,       allow_tf32, concurrent};
  check(problem);
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
  if (is_grid(choice.tier)) {
    const GridPlan& grid = choice.grid;
    py::dict shape;
    shape["fragments"] = grid.fragments;
    shape["tiles"] = grid.tiles;
    shape["ctas"] = grid.ctas;
    shape["groups"] = grid.groups;
    shape["rows"] = grid.rows;
    result[tier_name(choice.tier)] = shape;
  }
  if (choice.tier == CudaTier::block || choice.tier == CudaTier::cluster) {
    const ClusterPlan& cluster = choice.cluster;
    py::dict shape;
    shape["ctas"] = cluster.ctas;
    shape["clusters"] = cluster.clusters;
    shape["rows"] = cluster.rows;
    shape["tf32"] = cluster.tf32;
    result[tier_name(choice.tier)] = shape;
  }
  return result;
}

py::dict directions(int cell, int dtype, int64_t steps, int64_t batch, int64_t hidden, int64_t proj,
                    int64_t rows, bool packed, bool allow_tf32, const py::dict& device, int tier,
                    bool trains, bool replayed) {
  const CudaProblem problem{Cell(cell), Pass::forward, DType(dtype), steps,  batch,
                            hidden,     proj,          rows,         packed, allow_tf32};
  check(problem);
  const Directions found =
      choose_directions(problem, trains, replayed, limits_of(device), CudaTier(tier));
  py::dict result;
  result["side_by_side"] = found.side_by_side;
  result["us_side_by_side"] =
      found.us_side_by_side > 0 ? py::object(py::float_(found.us_side_by_side)) : py::none();
  result["us_in_turn"] = found.us_in_turn;
  return result;
}

}  // namespace

void bind_plan(py::module_& m) {
  m.def("cuda_plan", &plan, py::arg("cell"), py::arg("backward"), py::arg("dtype"),
        py::arg("steps"), py::arg("batch"), py::arg("hidden"), py::arg("proj"), py::arg("rows"),
        py::arg("packed"), py::arg("allow_tf32"), py::arg("device"), py::arg("tier"),
        py::arg("concurrent") = 1,
        "How a layer would run on a device like `device` (a dict as cuda_device_limits returns "
        "it): tier (None: the tier asked for cannot), shape (in words), its numbers under the "
        "tier's name, and forecasts: of each tier whether it is able, its obstacle, us_per_step "
        "and us_per_call.\n\n"
        "cell: 0 LSTM, 1 GRU with reset after, 2 GRU with reset before. rows: of all steps "
        "together. dtype and tier: as in "
        "csrc/core/params.h. concurrent: launches like this one that share the device; the times "
        "are then those until all have ended. They are derived (csrc/launch/cost_model.h), not "
        "measured.");
  m.def("cuda_directions", &directions, py::arg("cell"), py::arg("dtype"), py::arg("steps"),
        py::arg("batch"), py::arg("hidden"), py::arg("proj"), py::arg("rows"), py::arg("packed"),
        py::arg("allow_tf32"), py::arg("device"), py::arg("tier"), py::arg("trains"),
        py::arg("replayed"),
        "Whether the directions of a bidirectional layer should run side_by_side, each on half of "
        "the device, by the derived us_side_by_side (None: the tier cannot) and us_in_turn of all "
        "of it. Arguments as of cuda_plan, of one direction; trains: a backward pass follows; "
        "replayed: a CUDA graph is being captured, so that the host's time does not count.");
}

}  // namespace rnnlm
