"""``rnnlm-kernels info``: what was built, what there is to run on, which plan a problem gets."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from typer import Option

from .. import tuning
from ..backends import tunable
from ..bench import machine
from ..build import build_info
from ..dispatch import BackendError, backends, plan
from ..options import Problem, RecurrenceOptions
from .tables import console, table


def typical_problems(device: str = "cpu") -> dict[str, Problem]:
    """Problems that between them show every choice dispatch makes, by what they stand for."""
    return {
        "word language model, training": Problem(
            "lstm", 400, 1150, device=device, seq_len=70, batch=80, training=True
        ),
        "speech GRU, bfloat16 training": Problem(
            "gru", 256, 256, torch.bfloat16, device, seq_len=128, batch=32, training=True
        ),
        "classic GRU (reset before), inference": Problem(
            "gru",
            256,
            256,
            device=device,
            seq_len=128,
            batch=32,
            options=RecurrenceOptions(reset="before"),
        ),
        "packed sequences, training": Problem(
            "lstm",
            64,
            64,
            device=device,
            seq_len=1000,
            batch=8,
            training=True,
            options=RecurrenceOptions(packed=True),
        ),
        "one step of one row, inference": Problem(
            "lstm", 256, 256, device=device, seq_len=1, batch=1
        ),
        "float64 for gradcheck": Problem(
            "gru", 5, 7, torch.float64, device, seq_len=4, batch=2, training=True
        ),
    }


def gather() -> dict[str, Any]:
    """Everything ``info`` shows, as data."""
    plans = {}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        for title, problem in typical_problems(device).items():
            try:
                answer = asdict(plan(problem))
            except BackendError as error:
                answer = {"backend": "none", "kernel": "", "tile": "", "reason": str(error)}
            plans[f"{device}: {title}"] = {"problem": str(problem), **answer}
    available = {name: backend.available() for name, backend in backends().items()}
    return {
        "build": build_info(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "cuda": backends()["cuda"].state(),
        "tuned": _tables(),
        "backends": {n: {"available": ok, "reason": why} for n, (ok, why) in available.items()},
        "threads": torch.get_num_threads(),
        "plans": plans,
    }


def _tables() -> dict[str, str]:
    """Every tuned table that there is for a device: what it holds, or why it is not used."""
    if tuning.switched_off():
        return {"none": f"{tuning.ENVIRONMENT}={tuning.OFF}"}
    found = {}
    for name, backend in tunable().items():
        for device in backend.devices():
            for source in tuning.sources(name, device, backend.identity):
                words = f"not used: {source.refusal}"
                if source.table is not None:
                    words = f"in use for {name}, {source.table.words}"
                found[str(source.path)] = words
    return found or {"none": "`rnnlm-kernels tune` measures one"}


def info(
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what was built, which devices exist, and which plan typical problems get, and why."""
    found = gather()
    if as_json:
        typer.echo(json.dumps(found, indent=2, default=str))
        return
    output = console()
    output.print(_pairs("Build", found["build"]))
    facts = {**found["machine"], "threads torch uses": found["threads"], **found["versions"]}
    output.print(_pairs("Machine", facts))
    output.print(_pairs("CUDA", found["cuda"]))
    output.print(_pairs("Tuned tables", found["tuned"]))
    states = table("Backends", ("backend", "available", "reason"))
    for name, state in found["backends"].items():
        states.add_row(name, "yes" if state["available"] else "no", state["reason"])
    output.print(states)
    output.print("[bold]Plans of typical problems[/bold]")
    for title, answer in found["plans"].items():
        tile = f" [{answer['tile']}]" if answer["tile"] else ""
        lines = (
            f"  {title}",
            f"    {answer['problem']}",
            f"    {answer['backend']}: {answer['kernel']}{tile}",
            f"    because {answer['reason']}",
        )
        output.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _pairs(title: str, data: dict[str, Any]) -> Table:
    pairs = table(title, ("name", "value"))
    pairs.show_header = False
    pairs.columns[1].no_wrap = False
    for name, value in data.items():
        if isinstance(value, dict):
            value = [f"{key}: {item}" for key, item in value.items()]
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        pairs.add_row(name, text or "none")
    return pairs
