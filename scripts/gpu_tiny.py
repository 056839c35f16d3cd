"""Small jobs of scripts/gpu_check.sh: every kind of kernel on tiny problems, and the plans.

python scripts/gpu_tiny.py check [--emulate]   every CUDA tier against the float64 oracle
python scripts/gpu_tiny.py triton [--emulate]  every family of Triton kernels, likewise
python scripts/gpu_tiny.py profile             one long forward and backward, for a profiler
python scripts/gpu_tiny.py plan                tier and predicted time of every problem of the grid
python scripts/gpu_tiny.py tune --emulate ...  `rnnlm-kernels tune ...` in the emulator

`check` is what runs under compute-sanitizer, which slows kernels down a hundredfold: few steps, few
rows, the smallest layer that a tier still spreads over several CTAs. `plan` needs no GPU: without
one it plans for an H100.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tree itself; tests/ has the emulated device

from rnnlm_kernels import LSTM  # noqa: E402
from rnnlm_kernels.backends import cuda, triton  # noqa: E402
from rnnlm_kernels.bench.grids import gpu_grid  # noqa: E402
from rnnlm_kernels.bench.workload import Workload, row_lengths  # noqa: E402
from rnnlm_kernels.build import native  # noqa: E402
from rnnlm_kernels.check import check_problem  # noqa: E402

H100 = {"compute_capability": 90, "sms": 132, "shared_per_block": 227 * 1024, "cooperative": True}
# Under a sanitizer a step takes so long that an ordinary wait would be given up.
PATIENT_POLLS, PATIENT_NANOSECONDS = 2**31, 120 * 10**9
CELLS = {"lstm": 0, "gru": 1, "gru-before": 2}

# Hidden sizes: the stepwise tier takes any, the others multiples of 8; a cluster of two and more
# begins above 128. Pairs are for 16 bits.
TIERS = {"stepwise": 24, "block": 64, "cluster": 136, "grid": 64, "grid-pairs": 64}
FAMILIES = {"stepwise": 40, "sequence": 24}


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def check(backend: str, emulate: bool) -> int:
    """Run every kind of kernel; returns how many problems were wrong or could not be run."""
    kinds, variable = {
        "cuda": (TIERS, cuda.ENVIRONMENT),
        "triton": (FAMILIES, triton.ENVIRONMENT),
    }[backend]
    using: Any = functools.partial(environment, variable)
    if emulate and backend == "cuda":
        from cuda_emulated import emulated as using
    elif emulate:
        os.environ["TRITON_INTERPRET"] = "1"
        from triton_interpreted import interpreted as using
    elif backend == "cuda":
        native.cuda_set_wait_limit(PATIENT_POLLS, PATIENT_NANOSECONDS)
    device = "cpu" if emulate else "cuda"
    bad = 0
    for kind, hidden in kinds.items():
        for cell in CELLS:
            for dtype in ("bfloat16", "float32")[: 1 if kind == "grid-pairs" else 2]:
                workload = Workload(
                    cell, 3, 3, 8, hidden, dtype=dtype, device=device, mode="training"
                )
                packed = dataclasses.replace(workload, lengths="packed", bidirectional=True)
                for one in (workload, packed):
                    try:
                        with using(kind):
                            result = check_problem(one, backend)
                        words, wrong = result.summary(), not result.ok
                    except (RuntimeError, ValueError) as error:
                        words, wrong = f"did not run: {error}", True
                    bad += wrong
                    print(f"{'BAD' if wrong else 'ok ':3} {kind:10} {one.label:36} {words}")
    print(f"{bad} of the problems are bad" if bad else "all problems ok")
    return bad


def profile() -> None:
    """A layer that the grid tier runs, forward and backward, twice: once to warm up."""
    layer = LSTM(1024, 1024, backend="cuda").to("cuda", torch.bfloat16)
    x = torch.randn(64, 16, 1024, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        output, _ = layer(x)
        output.backward(output.detach())
    torch.cuda.synchronize()


def plan_line(workload: Workload, limits: dict[str, Any]) -> str:
    """What the cost model would do with a problem's layers, and the time that it derives."""
    words = []
    for backward in range(1 + (workload.mode == "training")):
        found = native.cuda_plan(
            cell=CELLS[workload.cell],
            backward=backward,
            dtype=cuda._DTYPES[workload.torch_dtype],
            steps=workload.seq_len,
            batch=workload.batch,
            hidden=workload.hidden_size,
            proj=workload.proj_size,
            rows=int(row_lengths(workload).sum()),
            packed=workload.lengths == "packed",
            allow_tf32=workload.dtype == "tf32",
            device=limits,
            tier=cuda.TIERS.index("auto"),
        )
        forecast = found["forecasts"][found["tier"]]
        words.append(f"{found['shape']}, {forecast['us_per_step']:.2f} us/step")
    return f"{workload.label:40} {workload.mode:10} {' | '.join(words)}"


def plan() -> None:
    limits = H100
    if torch.cuda.is_available() and hasattr(native, "cuda_device_limits"):
        limits = native.cuda_device_limits(torch.cuda.current_device())
    print(f"derived, not measured, for {limits}; forward | backward")
    for workload in gpu_grid():
        print(plan_line(workload, limits))


def tune(options: list[str]) -> None:
    """What the command finds out about the emulator's tiers is of no use; that it works is."""
    from cuda_emulated import emulated

    from rnnlm_kernels.cli import app

    with emulated():
        app(["tune", *options])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=("check", "triton", "profile", "plan", "tune"))
    parser.add_argument(
        "--emulate", action="store_true", help="without a GPU: in the emulator, or Triton's"
    )
    arguments, options = parser.parse_known_args()
    if (arguments.job == "tune") != bool(options):
        parser.error(f"options of `rnnlm-kernels tune` go with tune, got {options}")
    if arguments.job in ("check", "triton"):
        backend = "cuda" if arguments.job == "check" else "triton"
        return 1 if check(backend, arguments.emulate) else 0
    if arguments.job == "tune":
        tune(options)
    else:
        (profile if arguments.job == "profile" else plan)()
    return 0


if __name__ == "__main__":
    sys.exit(main())
