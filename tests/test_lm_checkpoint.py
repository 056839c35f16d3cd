"""Checkpoints: whole or not at all, the best and the last, and no code in them."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch

from rnnlm_kernels import lm
from rnnlm_kernels.lm import checkpoint

TEXT = "the cat sat on the mat; the dog ate the cat's hat.\n" * 40


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # These models are so small that a second thread only waits.
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


@pytest.fixture(scope="module")
def corpus() -> lm.Corpus:
    return lm.corpus_from_text(TEXT, unit="char", name="cats")


def _trainer(corpus: lm.Corpus, out: Path | None = None, **options) -> lm.Trainer:
    config = lm.ModelConfig(len(corpus.vocabulary), emb=8, hidden=8)
    model = lm.RNNLanguageModel(config, seed=3)
    options = {"batch": 4, "bptt": 20, "max_steps": 10, "save_every": 7} | options
    return lm.Trainer(model, corpus, lm.TrainConfig(**options), out=out)


def _payload(step: int, **parts) -> dict:
    return {"step": step, "model": {}, "tokenizer": {}, "training": {}} | parts


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nested_values_come_back_as_they_were(tmp_path) -> None:
    training = {
        "plain": [1, 2.5, None, True, "text", math.inf],
        1: {"tuple": (torch.arange(3), (torch.tensor(2.0),)), "empty": {}},
        "bool": torch.tensor([True, False]),
    }
    lm.save_checkpoint(_payload(4, training=training), tmp_path)
    loaded = lm.load_checkpoint(tmp_path)
    assert loaded["step"] == 4
    assert loaded["training"]["plain"] == training["plain"]
    first, (second,) = loaded["training"][1]["tuple"]
    assert torch.equal(first, torch.arange(3))
    assert torch.equal(second, torch.tensor(2.0))
    assert torch.equal(loaded["training"]["bool"], training["bool"])
    assert loaded["training"][1]["empty"] == {}


@pytest.mark.parametrize("value", [0.1, 1e-300, 1 / 3, -math.inf, 2**62], ids=str)
def test_numbers_come_back_to_the_last_bit(tmp_path, value: float) -> None:
    lm.save_checkpoint(_payload(1, training={"value": value}), tmp_path)
    assert lm.load_checkpoint(tmp_path)["training"]["value"] == value


def test_a_shared_matrix_is_stored_once_and_has_both_names(corpus, tmp_path) -> None:
    trainer = _trainer(corpus, tmp_path, max_steps=1)
    trainer.run()
    stored = safetensors.torch.load_file(tmp_path / "step-00000001" / "model.safetensors")
    assert "head.weight" not in stored
    loaded = lm.load_checkpoint(tmp_path)["model"]
    assert torch.equal(loaded["head.weight"], trainer.model.embedding.weight)


def test_all_files_are_safetensors_or_json(corpus, tmp_path) -> None:
    _trainer(corpus, tmp_path, max_steps=1).run()
    for path in tmp_path.rglob("*"):
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.is_file():
            safetensors.torch.load_file(path)


def test_best_and_last_are_kept_and_nothing_else(tmp_path) -> None:
    for step, best in ((1, True), (2, False), (3, True), (4, False), (5, False)):
        lm.save_checkpoint(_payload(step), tmp_path, best=best)
    assert _names(tmp_path) == [lm.CHECKPOINT_NAME, "step-00000003", "step-00000005"]
    assert lm.load_checkpoint(tmp_path)["step"] == 5
    assert lm.load_checkpoint(tmp_path, "best")["step"] == 3
    assert lm.load_checkpoint(tmp_path / "step-00000003")["step"] == 3


def test_one_step_can_be_saved_twice(tmp_path) -> None:
    for note in ("one", "other"):
        lm.save_checkpoint(_payload(1, note=note), tmp_path)
    assert lm.load_checkpoint(tmp_path)["note"] == "other"
    assert len(_names(tmp_path)) == 2


def test_best_is_refused_before_any_evaluation(tmp_path) -> None:
    lm.save_checkpoint(_payload(1), tmp_path)
    with pytest.raises(lm.CheckpointError, match="has no best checkpoint"):
        lm.load_checkpoint(tmp_path, "best")


def test_a_training_that_ends_at_its_best_writes_it_once(corpus, tmp_path) -> None:
    _trainer(corpus, tmp_path, max_steps=None, epochs=2, lr=0.02).run()
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    index = json.loads((tmp_path / lm.CHECKPOINT_NAME).read_text())
    assert index["best"] == index["last"] == folder.name == "step-00000046"


def test_the_best_of_a_training_predicts_best(corpus, tmp_path) -> None:
    # The learning rate ruins the model after a good start.
    trainer = _trainer(
        corpus, tmp_path, optimizer="sgd", lr=200.0, clip=1.0, max_steps=120, eval_every=10,
        schedule="constant",
    )  # fmt: skip
    seen = [record for record in trainer.records() if isinstance(record, lm.EvalRecord)]
    best = min(seen, key=lambda record: record.valid.loss)
    assert best is not seen[-1]
    assert lm.load_checkpoint(tmp_path, "best")["step"] == best.step
    model, _ = lm.load_model(tmp_path)
    assert lm.evaluate(model, corpus.valid) == best.valid
    last, _ = lm.load_model(tmp_path, "last")
    assert lm.evaluate(last, corpus.valid) == seen[-1].valid


def _disk_full_in_write(patch: pytest.MonkeyPatch) -> None:
    def save(tensors: object, path: Path) -> None:
        Path(path).write_bytes(b"half a checkpoint")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(safetensors.torch, "save_file", save)


def _safetensors_error(patch: pytest.MonkeyPatch) -> None:
    def save(tensors: object, path: Path) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device")

    patch.setattr(safetensors.torch, "save_file", save)


def _failing(function: str, call: int = 1):
    def fail(patch: pytest.MonkeyPatch) -> None:
        real, calls = getattr(os, function), []

        def raise_it(*args: object) -> object:
            calls.append(args)
            if len(calls) == call:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*args)

        patch.setattr(os, function, raise_it)

    return fail


WRITE_FAILURES = pytest.mark.parametrize(
    "fail",
    [
        pytest.param(_disk_full_in_write, id="disk-full"),
        pytest.param(_safetensors_error, id="safetensors-error"),
        pytest.param(_failing("fsync"), id="fsync"),
        pytest.param(_failing("replace"), id="rename-folder"),
        pytest.param(_failing("replace", 2), id="rename-pointer"),
    ],
)


@WRITE_FAILURES
def test_failed_write_leaves_the_checkpoint_before_it(tmp_path, monkeypatch, fail) -> None:
    lm.save_checkpoint(_payload(1), tmp_path)
    before = _names(tmp_path)
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises(lm.CheckpointWriteError, match="the checkpoint before it is untouched"):
            lm.save_checkpoint(_payload(2), tmp_path)
    assert lm.load_checkpoint(tmp_path)["step"] == 1
    assert _names(tmp_path) == before


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    resource = pytest.importorskip("resource", reason="no file size limits on this system")
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def test_a_really_failing_write_leaves_the_checkpoint_before_it(tmp_path) -> None:
    lm.save_checkpoint(_payload(1), tmp_path)
    big = _payload(2, model={"weight": torch.zeros(1 << 20)})
    with _largest_file(1 << 20), pytest.raises(lm.CheckpointWriteError, match=r"cannot write"):
        lm.save_checkpoint(big, tmp_path)
    assert lm.load_checkpoint(tmp_path)["step"] == 1
    assert _names(tmp_path) == [lm.CHECKPOINT_NAME, "step-00000001"]


def test_interrupted_write_leaves_the_checkpoint_before_it(tmp_path, monkeypatch) -> None:
    lm.save_checkpoint(_payload(1), tmp_path)

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            lm.save_checkpoint(_payload(2), tmp_path)
    assert lm.load_checkpoint(tmp_path)["step"] == 1
    assert _names(tmp_path) == [lm.CHECKPOINT_NAME, "step-00000001"]


def test_training_survives_a_failed_write_on_the_way(corpus, tmp_path, monkeypatch, caplog) -> None:
    expected = [record.loss for record in _trainer(corpus).records() if _is_step(record)]
    trainer = _trainer(corpus, tmp_path)
    seen = []
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "rnnlm_kernels"):
        _disk_full_in_write(patch)
        records = trainer.records()
        for record in records:
            seen.append(record.loss)
            if record.step == 9:  # the write after update 7 has failed, the one at the end is fine
                break
        assert "training goes on" in caplog.text
        assert _names(tmp_path) == []
    seen += [record.loss for record in records if _is_step(record)]
    assert seen == expected
    assert lm.load_checkpoint(tmp_path)["step"] == 10


def _is_step(record: object) -> bool:
    return isinstance(record, lm.StepRecord)


def test_failed_last_write_is_an_error(corpus, tmp_path, monkeypatch) -> None:
    trainer = _trainer(corpus, tmp_path, max_steps=2)
    _disk_full_in_write(monkeypatch)
    with pytest.raises(lm.CheckpointWriteError, match=os.strerror(errno.ENOSPC)):
        trainer.run()


def test_folder_that_cannot_be_made_is_known_before_training(corpus, tmp_path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(lm.CheckpointError, match="cannot write to"):
        _trainer(corpus, tmp_path / "file" / "run")


class _Payload:
    """Runs code when it is unpickled by a loader that allows it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize(
    "file", ["model.safetensors", "training.safetensors", "config.json", "training.json"]
)
def test_loading_a_checkpoint_runs_no_code(tmp_path, file: str) -> None:
    trace = tmp_path / "executed"
    lm.save_checkpoint(_payload(1), tmp_path)
    (tmp_path / "step-00000001" / file).write_bytes(pickle.dumps(_Payload(trace)))
    with pytest.raises(lm.CheckpointError, match="cannot read"):
        lm.load_checkpoint(tmp_path)
    assert not trace.exists()


def test_pointer_out_of_the_folder_is_refused(tmp_path) -> None:
    lm.save_checkpoint(_payload(1), tmp_path)
    path = tmp_path / lm.CHECKPOINT_NAME
    path.write_text(path.read_text().replace("step-00000001", "../elsewhere"))
    with pytest.raises(lm.CheckpointError, match="is damaged: it names"):
        lm.load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "no checkpoint in", id="missing"),
        pytest.param("", "cannot read", id="empty"),
        pytest.param("not a checkpoint at all", "cannot read", id="text"),
        pytest.param('{"step": 1}', "no checkpoint of", id="foreign"),
        pytest.param('{"format": "rnnlm_kernels.lm", "version": 99}', "version 99", id="newer"),
        pytest.param(
            '{"format": "rnnlm_kernels.lm", "version": 2, "last": "step-1"}',
            "cannot read",
            id="folder-missing",
        ),
    ],
)
def test_unusable_pointers_are_named(tmp_path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / lm.CHECKPOINT_NAME).write_text(content)
    with pytest.raises(lm.CheckpointError, match=message) as error:
        lm.load_model(tmp_path)
    assert "\n" not in str(error.value)


FILES = ("config.json", "tokenizer.json", "training.json", "model.safetensors")


@pytest.mark.parametrize("damage", ["missing", "cut-short", "empty", "null"])
@pytest.mark.parametrize("file", FILES)
def test_damaged_files_are_named(corpus, tmp_path, file: str, damage: str) -> None:
    _trainer(corpus, tmp_path, max_steps=1).run()
    path = tmp_path / "step-00000001" / file
    if damage == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes({"cut-short": content[:99], "empty": b"", "null": b"null"}[damage])
    with pytest.raises(lm.CheckpointError, match=r"cannot read|does not fit"):
        lm.Trainer.resume(tmp_path, corpus)


def test_weights_of_another_checkpoint_are_refused(corpus, tmp_path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    _trainer(corpus, one, max_steps=1).run()
    larger = lm.corpus_from_text(TEXT + "0123456789" * 50, unit="char")
    _trainer(larger, other, max_steps=1).run()
    for file in ("model.safetensors", "tokenizer.json"):
        shutil.copy(other / "step-00000001" / file, one / "step-00000001" / file)
        with pytest.raises(lm.CheckpointError, match="does not fit"):
            lm.load_model(one)


def test_missing_safetensors_is_known_before_training(corpus, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(lm.CheckpointError, match=r"pip install 'rnnlm-kernels\[lm\]'"):
        _trainer(corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # Without a folder nothing of the kind is needed.
    _trainer(corpus, max_steps=1).run()


def test_version_is_checked_in_the_folder_too(tmp_path) -> None:
    lm.save_checkpoint(_payload(1), tmp_path)
    path = tmp_path / "step-00000001" / "config.json"
    path.write_text(path.read_text().replace(f'"version": {checkpoint.VERSION}', '"version": 1'))
    with pytest.raises(lm.CheckpointError, match="has checkpoint version 1"):
        lm.load_checkpoint(tmp_path)
