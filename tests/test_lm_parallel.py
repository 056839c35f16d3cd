"""Two processes (gloo) train as one does with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rnnlm_kernels import lm
from rnnlm_kernels.lm.objective import Objective

SHARDS = hasattr(torch.cpu.Stream, "record_event")
needs_sharding = pytest.mark.skipif(
    not SHARDS, reason="fully_shard cannot run on the CPU in torch 2.6"
)

TEXT = "the cat sat on the mat; the dog ate the cat's hat.\n" * 40

TRAIN = {"batch": 4, "bptt": 20, "max_steps": 30, "eval_batch": 5}
MODEL = {"emb": 8, "hidden": 12, "layers": 2, "dropout": 0.0}
EVERYTHING = (
    {"optimizer": "sgd", "lr": 3.0, "random_bptt": True, "accumulate": 2, "ar": 1.0, "tar": 0.5,
     "l2": {"*": 0.01}, "average": 0, "eval_every": 4},
    {"head": "adaptive", "cutoffs": [4, 9], "attention": 6},
)  # fmt: skip
SCENARIOS: dict[str, dict] = {
    "adam": {"train": TRAIN, "model": MODEL},
    "everything": {"train": TRAIN | EVERYTHING[0], "model": MODEL | EVERYTHING[1]},
    "whole": {"train": TRAIN, "model": MODEL | {"dropout": 0.4}},
    "begun": {"train": TRAIN | {"max_steps": 11}, "model": MODEL | {"dropout": 0.4}, "out": "run"},
    "resumed": {"train": TRAIN, "resume": "run"},
    "uneven": {"train": TRAIN | {"batch": 5}, "model": MODEL},
    "sentences": {"train": TRAIN | {"batching": "sentences"}, "model": MODEL},
}

# torchrun runs this file in two processes; process 0 writes what happened.
PROGRAM = """
import json, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[2])
import torch
from test_lm_parallel import SCENARIOS, SHARDS, course, sharded_gradients, sharded_weight_drop
from rnnlm_kernels import lm

torch.set_num_threads(1)
folder = Path(sys.argv[1])
with lm.process_group():
    seen = {}
    for name, scenario in SCENARIOS.items():
        try:
            seen[name] = course(scenario, folder)
        except ValueError as error:
            seen[name] = str(error)
    if SHARDS:
        seen["sharded"] = [sharded_gradients(by_layer) for by_layer in (False, True)]
        seen["sharded weight drop"] = sharded_weight_drop()
    if lm.this_process().rank == 0:
        (folder / "seen.json").write_text(json.dumps(seen))
"""


def course(scenario: dict, folder: Path) -> list[list[float]]:
    """What one process sees of a training."""
    corpus = lm.corpus_from_text(TEXT, unit="char")
    if "resume" in scenario:
        steps = scenario["train"]["max_steps"]
        trainer = lm.Trainer.resume(folder / scenario["resume"], corpus, max_steps=steps)
    else:
        config = lm.ModelConfig(len(corpus.vocabulary), **scenario["model"])
        model = lm.RNNLanguageModel(config, seed=3)
        out = folder / scenario["out"] if "out" in scenario else None
        trainer = lm.Trainer(model, corpus, lm.TrainConfig(**scenario["train"]), out=out)
    seen = []
    for record in trainer.records():
        if isinstance(record, lm.StepRecord):
            seen.append([record.loss, record.grad_norm, record.tokens])
        else:
            seen.append([record.valid.loss, 0.0, record.valid.tokens])
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    if lm.this_process().world > 1:
        first = weights.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, weights), "the processes have different weights"
    return seen


def _objective(**options) -> Objective:
    config = lm.ModelConfig(20, **(MODEL | options))
    model = lm.RNNLanguageModel(config, seed=3)
    return Objective(model, lm.TrainConfig(max_steps=1), torch.ones(20))


def _window() -> torch.Tensor:
    return torch.randint(20, (9, 4), generator=torch.Generator().manual_seed(1))


def _shard(objective: Objective, by_layer: bool) -> None:
    mesh = init_device_mesh("cpu", (2,))
    if by_layer:
        for layer in objective.model.layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh)


def sharded_gradients(by_layer: bool) -> float:
    """How far the gradients of a model sharded by FSDP2 are from those of a whole one."""
    whole, sharded, tokens = _objective(), _objective(), _window()
    whole(tokens[:-1], tokens[1:], None, 32.0)[0].backward()
    _shard(sharded, by_layer)
    mine = tokens.chunk(2, dim=1)[dist.get_rank()]
    sharded(mine[:-1], mine[1:], None, 16.0)[0].backward()
    pairs = zip(sharded.parameters(), whole.parameters(), strict=True)
    return max(float((a.grad.full_tensor() - b.grad).abs().max()) for a, b in pairs)


def sharded_weight_drop() -> list[str]:
    """What weight drop does in a sharded model, and in sharded layers."""
    found = []
    for by_layer in (False, True):
        objective, tokens = _objective(weight_drop=0.5), _window()
        _shard(objective, by_layer)
        try:
            one, other = (objective(tokens[:-1], tokens[1:], None, 1.0)[1] for _ in range(2))
            found.append("differs" if float(one.detach() - other.detach()) else "same")
        except RuntimeError as error:
            found.append(str(error))
    return found


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have run all scenarios."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("parallel")
    program = folder / "program.py"
    program.write_text(PROGRAM)
    path = [str(Path(__file__).parent), str(Path(lm.__file__).parents[2])]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(program), str(folder), json.dumps(path)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict:
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.parametrize("name", ["adam", "everything"])
def test_two_processes_train_as_one(seen, tmp_path, name: str) -> None:
    alone = torch.tensor(course(SCENARIOS[name], tmp_path))
    assert len(alone) > 30
    torch.testing.assert_close(torch.tensor(seen[name]), alone, rtol=2e-4, atol=1e-5)


def test_two_processes_go_on_exactly(seen) -> None:
    # The last record of the first part is the evaluation at its end.
    assert seen["begun"][:-1] + seen["resumed"] == seen["whole"]


def test_processes_have_masks_of_their_own(seen, folder) -> None:
    random = lm.load_checkpoint(folder / "run")["training"]["random"]
    assert len(random) == 2
    assert not torch.equal(random[0][0], random[1][0])


def test_the_state_of_all_rows_is_saved(seen, folder) -> None:
    training = lm.load_checkpoint(folder / "run")["training"]
    assert training["state"][0][0].shape == (1, 4, 12)
    corpus = lm.corpus_from_text(TEXT, unit="char")
    trainer = lm.Trainer.resume(folder / "run", corpus, max_steps=31)
    assert next(trainer.records()).tokens == 80


def test_rows_that_cannot_be_shared_are_refused(seen) -> None:
    assert "batch=5 rows cannot be dealt evenly to 2 processes" in seen["uneven"]
    assert "several processes share streams only" in seen["sentences"]


@needs_sharding
@pytest.mark.parametrize("by_layer", [False, True], ids=["model", "layers"])
def test_sharded_parameters_get_the_gradients_of_whole_ones(seen, by_layer: bool) -> None:
    assert seen["sharded"][by_layer] < 1e-7


@needs_sharding
def test_weight_drop_works_in_a_sharded_model_and_is_refused_in_sharded_layers(seen) -> None:
    """FSDP2 puts the whole weights in the place of masked ones when it runs a sharded layer."""
    assert seen["sharded weight drop"][0] == "differs"
    assert "shard the model, not its layers" in seen["sharded weight drop"][1]


def test_a_single_process_needs_no_group() -> None:
    with lm.process_group() as device:
        assert device.type == "cpu"
        assert (lm.this_process().rank, lm.this_process().world) == (0, 1)
