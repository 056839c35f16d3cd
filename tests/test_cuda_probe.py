"""The path from Python to a CUDA kernel: arguments, errors, stream and device of a launch."""

from __future__ import annotations

import pytest
import torch

from rnnlm_kernels import _C

HAS_CUDA_BUILD = _C.build_info()["cuda"]
NEEDS_CUDA_BUILD = pytest.mark.skipif(not HAS_CUDA_BUILD, reason="built without CUDA")
NEEDS_GPU = pytest.mark.skipif(
    not (HAS_CUDA_BUILD and torch.cuda.is_available()), reason="needs a CUDA build and a GPU"
)


def test_probe_is_there_exactly_when_cuda_was_built() -> None:
    info = _C.build_info()
    assert hasattr(_C, "cuda_probe") == info["cuda"]
    assert (info["cuda_version"] is not None) == info["cuda"]
    assert bool(info["cuda_archs"]) == info["cuda"]


@NEEDS_CUDA_BUILD
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"n": -1}, "n is -1", id="negative-size"),
        pytest.param({"x_ptr": 0}, "null pointer", id="null-input"),
        pytest.param({"y_ptr": 0}, "null pointer", id="null-output"),
        pytest.param({"device": -1}, "device is -1", id="negative-device"),
    ],
)
def test_wrong_arguments_are_refused_before_any_device_is_touched(
    arguments: dict[str, int], message: str
) -> None:
    call = {"x_ptr": 16, "y_ptr": 16, "n": 4, "a": 1.0, "device": 0} | arguments
    with pytest.raises(ValueError, match=message):
        _C.cuda_probe(**call)


@NEEDS_CUDA_BUILD
def test_an_empty_problem_launches_nothing_and_needs_no_gpu() -> None:
    _C.cuda_probe(0, 0, 0, 1.0)


@NEEDS_CUDA_BUILD
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a usable GPU")
def test_without_a_gpu_the_error_names_cause_and_mend() -> None:
    with pytest.raises(RuntimeError, match=r"CUDA error while .*\(cuda.*nvidia-smi"):
        _C.cuda_probe(16, 16, 4, 1.0)


@NEEDS_GPU
@pytest.mark.gpu
def test_an_absent_device_is_a_runtime_error() -> None:
    with pytest.raises(RuntimeError, match="CUDA_VISIBLE_DEVICES"):
        _C.cuda_probe(16, 16, 4, 1.0, device=torch.cuda.device_count())


@NEEDS_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 255, 257, 256 * 1024 * 3 + 5])
def test_probe_adds_a_times_x_on_the_given_stream(n: int) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.randn(n, device="cuda")
        y = torch.randn(n, device="cuda")
        # 0.5 * x is exact, so fused and unfused arithmetic round alike.
        expected = y + 0.5 * x
        _C.cuda_probe(
            x.data_ptr(), y.data_ptr(), n, 0.5, device=x.device.index, stream=stream.cuda_stream
        )
    stream.synchronize()
    assert torch.equal(y, expected)


@NEEDS_GPU
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_probe_leaves_the_current_device_as_it_was() -> None:
    x = torch.ones(8, device="cuda:1")
    y = torch.ones(8, device="cuda:1")
    stream = torch.cuda.current_stream(x.device).cuda_stream
    _C.cuda_probe(x.data_ptr(), y.data_ptr(), 8, 2.0, device=1, stream=stream)
    assert torch.cuda.current_device() == 0
    assert torch.equal(y, torch.full_like(y, 3.0))
