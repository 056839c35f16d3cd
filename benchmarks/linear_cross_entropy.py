"""Measures the head of a language model, linear + cross-entropy, in training: time and memory.

    python benchmarks/linear_cross_entropy.py                      # shapes of known models, float32
    python benchmarks/linear_cross_entropy.py --quick              # the smallest of them
    python benchmarks/linear_cross_entropy.py --dtype bfloat16 --threads 1 --out head.json
    python benchmarks/linear_cross_entropy.py --shape 1400,400,10000 --device cuda

Contenders, in turn in every round, forward and backward with a mean loss and a bias:

* ``ours``: :func:`rnnlm_kernels.linear_cross_entropy`
* ``unfused``: ``F.cross_entropy(F.linear(...))``
* ``torch``: ``F.linear_cross_entropy`` with ``LinearCrossEntropyOptions()``, where torch has it
* ``products``: the three matrix products alone, in our chunks: no head can be faster

First all losses and gradients are compared with the unfused head in float64. Times are medians over
rounds, each of a second step in a row. With one thread they are the process's CPU time as well,
which other processes disturb less.
Memory is what a step adds at most to what is there before it, each contender in a process of its
own: resident memory on a CPU (Linux), allocated memory on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from rnnlm_kernels import linear_cross_entropy
from rnnlm_kernels.bench.machine import commit, describe, versions
from rnnlm_kernels.ops.linear_cross_entropy import chunk_rows

# N = batch x steps, H, V: Zaremba small and medium, AWD-LSTM on PTB and WikiText-2.
SHAPES = [
    (700, 200, 10_000),
    (1400, 200, 10_000),
    (1400, 650, 10_000),
    (1400, 400, 10_000),
    (1400, 400, 33_278),
    (5600, 400, 33_278),
]
CONTENDERS = ("ours", "unfused", "torch", "products")
# Largest error of a loss or gradient, relative to the largest element of the exact one.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class Problem:
    """Tensors of one shape, and the steps that are compared on them."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
        rows, width, classes = shape
        draw = torch.Generator().manual_seed(0)
        weight = torch.randn(classes, width, generator=draw) * width**-0.5
        self.x = torch.randn(rows, width, generator=draw).to(device, dtype).requires_grad_()
        self.weight = weight.to(device, dtype).requires_grad_()
        self.bias = torch.randn(classes, generator=draw).to(device, dtype).requires_grad_()
        self.target = torch.randint(classes, (rows,), generator=draw).to(device)

    @property
    def leaves(self) -> list[torch.Tensor]:
        """What is differentiated."""
        return [self.x, self.weight, self.bias]

    def loss(self, contender: str, *leaves: torch.Tensor) -> torch.Tensor:
        """The mean loss as one of the contenders computes it."""
        x, weight, bias = leaves or self.leaves
        if contender == "unfused":
            return F.cross_entropy(F.linear(x, weight, bias), self.target)
        if contender == "torch":
            options = torch.nn.LinearCrossEntropyOptions()
            return F.linear_cross_entropy(x, weight, self.target, linear_bias=bias, options=options)
        return linear_cross_entropy(x, weight, self.target, linear_bias=bias)

    def step(self, contender: str) -> Callable[[], None]:
        """A function that runs one forward and backward."""
        if contender == "products":
            return self._products

        def run() -> None:
            for leaf in self.leaves:
                leaf.grad = None
            self.loss(contender).backward()

        return run

    @torch.no_grad()
    def _products(self) -> None:
        x, weight = self.x, self.weight
        chunk = chunk_rows(len(x), len(weight), x.element_size(), x.device.type)
        logits = x.new_empty((chunk, len(weight)))
        d_x, d_weight = torch.empty_like(x), torch.empty_like(weight)
        for start in range(0, len(x), chunk):
            part = slice(start, min(start + chunk, len(x)))
            rows = logits[: part.stop - part.start]
            torch.mm(x[part], weight.t(), out=rows)
            torch.mm(rows, weight, out=d_x[part])
            d_weight.addmm_(rows.t(), x[part], beta=1 if start else 0)

    def errors(self, contender: str) -> dict[str, float]:
        """Of loss and gradients against float64, relative to the largest element."""
        loss = self.loss(contender)
        found = [loss, *torch.autograd.grad(loss, self.leaves)]
        exact = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        loss = self.loss("unfused", *exact)
        expected = [loss, *torch.autograd.grad(loss, exact)]
        return {
            name: float(((a.double() - b).abs().max() / b.abs().max()).detach())
            for name, a, b in zip(("loss", "x", "weight", "bias"), found, expected, strict=True)
        }

    def memory(self, contender: str) -> int:
        """Bytes that a step adds at most to what is there before the step."""
        run = self.step(contender)
        if self.x.is_cuda:
            run()
            for leaf in self.leaves:
                leaf.grad = None
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            return torch.cuda.max_memory_allocated() - before
        # What libraries allocate once is not the step's: a step of the smallest size comes first.
        Problem((2, 8, 16), self.x.dtype, "cpu").step(contender)()
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        run()
        return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def measure(arguments: argparse.Namespace, shape: tuple[int, int, int]) -> dict[str, object]:
    """Checks, times and weighs all contenders on one shape."""
    dtype = getattr(torch, arguments.dtype)
    problem = Problem(shape, dtype, arguments.device)
    contenders = [c for c in CONTENDERS if c != "torch" or hasattr(F, "linear_cross_entropy")]
    row: dict[str, object] = {"N": shape[0], "H": shape[1], "V": shape[2]}
    errors = problem.errors("ours")
    row["errors"] = errors
    if max(errors.values()) > TOLERANCE[dtype]:
        raise SystemExit(f"wrong results at N, H, V = {shape}: {errors}")
    steps = {contender: problem.step(contender) for contender in contenders}
    wall: dict[str, list[float]] = {contender: [] for contender in contenders}
    cpu: dict[str, list[float]] = {contender: [] for contender in contenders}
    for round_ in range(arguments.rounds):
        for contender in contenders if round_ % 2 else reversed(contenders):
            # Once untimed: the first step after another contender's finds other memory in malloc's
            # lists than steps of a training would, and fresh pages cost more than small products.
            steps[contender]()
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            start, start_cpu = time.perf_counter(), time.process_time()
            steps[contender]()
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            wall[contender].append(time.perf_counter() - start)
            cpu[contender].append(time.process_time() - start_cpu)
    product_flops = 6 * math.prod(shape)
    for contender in contenders:
        seconds = statistics.median(wall[contender])
        row[contender] = {
            "ms": round(1e3 * seconds, 3),
            "ms, fastest": round(1e3 * min(wall[contender]), 3),
            "cpu ms": round(1e3 * statistics.median(cpu[contender]), 3),
            "GFLOP/s of the products": round(product_flops / seconds / 1e9, 1),
        }
        if contender != "products":
            shown = ",".join(map(str, shape))
            command = [sys.executable, __file__, "--weigh", contender, "--shape", shown]
            for option in ("dtype", "device", "threads"):
                command += [f"--{option}", str(getattr(arguments, option))]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            row[contender]["MiB"] = round(int(done.stdout) / 2**20, 1)
    return row


def ratio(row: dict, key: str) -> float:
    """The unfused head's figure by ours: above 1 is faster, or less memory."""
    return row["unfused"][key] / row["ours"][key]


def main() -> None:
    """Reads the command line, measures, prints a table and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", metavar="N,H,V")
    parser.add_argument("--quick", action="store_true", help="the smallest shape, 3 rounds")
    parser.add_argument("--dtype", default="float32", choices=[str(d)[6:] for d in TOLERANCE])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="where the result is written, as JSON")
    parser.add_argument("--weigh", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = SHAPES[:1] if arguments.quick else SHAPES
    if arguments.shape:
        shapes = [tuple(map(int, shape.split(","))) for shape in arguments.shape]
    if arguments.weigh:
        problem = Problem(shapes[0], getattr(torch, arguments.dtype), arguments.device)
        print(problem.memory(arguments.weigh))
        return
    if arguments.quick:
        arguments.rounds = min(arguments.rounds, 3)
    rows = []
    print("|    N |   H |     V | ours ms | unfused ms | torch ms | products ms | speed | memory |")
    print("|" + "---|" * 9)
    for shape in shapes:
        row = measure(arguments, shape)
        rows.append(row)
        times = [row[c]["ms"] if c in row else math.nan for c in CONTENDERS]
        cells = [*shape, *(f"{ms:.1f}" for ms in times)]
        cells += [f"{ratio(row, 'ms'):.2f}x", f"{1 / ratio(row, 'MiB'):.2f}x"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    speeds = [ratio(row, "ms") for row in rows]
    summary = {
        "speed, geometric mean": round(statistics.geometric_mean(speeds), 3),
        "speed, smallest": round(min(speeds), 3),
        "cpu time, geometric mean": round(
            statistics.geometric_mean(ratio(row, "cpu ms") for row in rows), 3
        ),
        "memory, largest share": round(max(1 / ratio(row, "MiB") for row in rows), 3),
    }
    print(json.dumps(summary, indent=1))
    if arguments.out is not None:
        result = {
            "machine": describe(),
            "versions": versions(),
            "commit": commit(),
            "dtype": arguments.dtype,
            "device": arguments.device,
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "summary": summary,
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
