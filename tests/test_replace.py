"""replace() and restore(): in place, nothing lost, everything reported."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from nn_pairs import CELLS, LAYERS, assert_same, flat, layer_cases, pair

import rnnlm_kernels
from rnnlm_kernels.nn import Report, replace, restore

KINDS = (*LAYERS, *CELLS)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 3)
        self.lstm = torch.nn.LSTM(3, 4, num_layers=2, dropout=0.5)
        self.gru = torch.nn.GRU(4, 5, bidirectional=True)
        self.cells = torch.nn.ModuleList([torch.nn.LSTMCell(10, 6), torch.nn.GRUCell(6, 7)])
        self.outer = torch.nn.Linear(7, 2)

    def forward(self, x):
        x, _ = self.gru(self.lstm(self.inner(x))[0])
        hx, h = None, None
        for step in x:
            hx = self.cells[0](step, hx)
            h = self.cells[1](hx[0], h)
        return self.outer(h)


def recurrent(model):
    return [model.lstm, model.gru, *model.cells]


def test_replaces_all_four_kinds_and_nothing_else():
    model = Model()
    report = replace(model)
    assert [type(m) for m in recurrent(model)] == [
        rnnlm_kernels.LSTM,
        rnnlm_kernels.GRU,
        rnnlm_kernels.LSTMCell,
        rnnlm_kernels.GRUCell,
    ]
    assert type(model.inner) is torch.nn.Linear
    assert [swap.name for swap in report.swapped] == ["lstm", "gru", "cells.0", "cells.1"]
    assert report.skipped == ()
    assert report.model is model


def test_outputs_and_gradients_stay_the_same():
    model = Model().double().eval()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    results = []
    for change in (None, replace, restore):
        if change:
            assert change(model)
        model.zero_grad()
        output = model(x)
        output.sum().backward()
        results.append([output.detach(), *(p.grad.clone() for p in model.parameters())])
    assert_same(results[1], results[0], tolerance=1e-11)
    assert_same(results[2], results[0], tolerance=1e-11)


@pytest.mark.parametrize(("kind", "options"), layer_cases())
def test_every_option_of_a_layer_survives_replace_and_restore(kind, options):
    theirs, expected = pair(kind, **options)
    module = copy.deepcopy(theirs)
    shape = (2, 4, 3)
    x = torch.randn(shape, dtype=torch.float64)
    replace(module)
    assert repr(module) == repr(expected)
    assert_same(module(x), expected(x))
    restore(module)
    assert type(module) is type(theirs)
    assert repr(module) == repr(theirs)
    assert set(module.__dict__) == set(theirs.__dict__)
    assert all(a is b for a, b in zip(module._flat_weights, module.parameters(), strict=True))
    assert_same(module(x), theirs(x), tolerance=0)


@pytest.mark.parametrize("kind", KINDS)
def test_model_that_is_a_recurrent_module_itself_is_replaced(kind):
    module = getattr(torch.nn, kind)(3, 4)
    report = replace(module)
    assert report.model is module
    assert type(module) is getattr(rnnlm_kernels, kind)
    assert report.swapped[0].name == ""
    assert str(report) == f"(model): torch.nn.{kind}(3, 4) -> rnnlm_kernels.{kind}(3, 4)"
    assert restore(module)
    assert type(module) is getattr(torch.nn, kind)


def test_modules_parameters_and_their_order_stay_the_same_objects():
    model = Model()
    modules, parameters = recurrent(model), dict(model.named_parameters())
    replace(model)
    assert all(a is b for a, b in zip(recurrent(model), modules, strict=True))
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_optimizer_and_its_state_go_on():
    model = Model().double().eval()
    twin = copy.deepcopy(model)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in (model, twin)]
    for step in range(4):
        if step == 2:
            replace(model)
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).pow(2).sum().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_hooks_stay_and_can_still_be_removed():
    model = Model()
    calls = []
    handles = [
        model.lstm.register_forward_hook(lambda *_: calls.append("lstm")),
        model.cells[0].register_forward_pre_hook(lambda *_: calls.append("cell")),
    ]
    replace(model)
    model(torch.randn(1, 2, 3))
    assert calls == ["lstm", "cell"]
    for handle in handles:
        handle.remove()
    model(torch.randn(1, 2, 3))
    assert calls == ["lstm", "cell"]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_training_flag_stays(training):
    model = Model().train(training)
    replace(model)
    assert all(m.training is training for m in model.modules())
    model.train(not training)
    restore(model)
    assert all(m.training is not training for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_dtype_and_device_stay(dtype):
    model = Model().to("meta", dtype)
    replace(model)
    assert all(p.is_meta and p.dtype == dtype for p in model.parameters())


def test_module_with_several_names_stays_one_object_and_is_reported_once():
    shared = torch.nn.GRU(3, 3)
    model = torch.nn.ModuleDict({"a": shared, "b": torch.nn.Sequential(shared)})
    report = replace(model)
    assert model["a"] is model["b"][0] is shared
    assert [swap.name for swap in report.swapped] == ["a, b.0"]


def test_references_outside_the_model_see_the_change():
    model = Model()
    held = {"unregistered": [model.gru]}
    replace(model)
    assert type(held["unregistered"][0]) is rnnlm_kernels.GRU


def test_tied_weights_stay_tied():
    model = torch.nn.ModuleList([torch.nn.LSTM(4, 4), torch.nn.LSTM(4, 4)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    replace(model)
    assert model[1].weight_hh_l0 is model[0].weight_hh_l0


def test_replacing_twice_changes_nothing_more():
    model = Model()
    assert replace(model)
    second = replace(model)
    assert not second
    assert second.swapped == second.skipped == ()


def test_model_without_recurrent_modules_gives_a_false_report():
    report = replace(torch.nn.Linear(2, 2))
    assert not report
    assert str(report) == "no recurrent module found"
    assert not restore(torch.nn.Linear(2, 2))


class Mine(torch.nn.LSTM):
    """A subclass, as users write them."""


def _parametrized():
    layer = torch.nn.GRU(3, 4)
    torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    return layer


def _forward_on_the_object():
    layer = torch.nn.LSTM(3, 4)
    layer.forward = lambda x: x
    return layer


LEFT_ALONE = {
    "subclass": (lambda: Mine(3, 4), "subclass"),
    "parametrized": (_parametrized, "parametrized"),
    "elman": (lambda: torch.nn.RNN(3, 4), "Elman"),
    "elman-cell": (lambda: torch.nn.RNNCell(3, 4), "Elman"),
    "forward-on-the-object": (_forward_on_the_object, "forward was set on the object"),
    "gru-with-projection": (
        lambda: torch.nn.GRU(3, 4, 1, True, False, 0.0, False, 2),
        "proj_size",
    ),
}


@pytest.mark.parametrize(("make", "reason"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_is_left_alone_is_reported_with_the_reason(make, reason):
    module = make()
    kind, keys = type(module), set(module.__dict__)
    model = torch.nn.Sequential(module)
    report = replace(model)
    assert not report
    assert type(model[0]) is kind
    assert set(module.__dict__) == keys
    (skipped,) = report.skipped
    assert skipped.name == "0"
    assert reason in skipped.reason
    assert "0: " in str(report)
    assert "left alone" in str(report)


def test_recurrent_module_inside_one_left_alone_is_replaced():
    class Outer(torch.nn.LSTM):
        def __init__(self):
            super().__init__(3, 4)
            self.inner = torch.nn.GRU(3, 4)

    model = Outer()
    report = replace(model)
    assert [swap.name for swap in report.swapped] == ["inner"]
    assert len(report.skipped) == 1


def test_parametrizing_after_replace_works_and_blocks_restore_until_removed():
    model = torch.nn.Sequential(torch.nn.GRU(3, 4))
    replace(model)
    torch.nn.utils.parametrizations.weight_norm(model[0], "weight_hh_l0")
    model(torch.randn(2, 2, 3))
    report = restore(model)
    assert not report
    assert "parametrized" in report.skipped[0].reason
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight_hh_l0")
    assert restore(model)
    assert type(model[0]) is torch.nn.GRU


def test_constructed_modules_are_not_restored():
    model = torch.nn.Sequential(rnnlm_kernels.LSTM(3, 4))
    report = restore(model)
    assert not report
    assert type(model[0]) is rnnlm_kernels.LSTM
    assert "not replaced" in report.skipped[0].reason


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [("LSTM", "return_cells", True), ("GRU", "reset", "before"), ("GRUCell", "reset", "before")],
)
def test_options_that_torch_lacks_block_restore_with_the_reason(kind, option, value):
    model = torch.nn.Sequential(getattr(torch.nn, kind)(3, 4))
    replace(model)
    setattr(model[0], option, value)
    report = restore(model)
    assert not report
    assert f"{option}={value!r}" in report.skipped[0].reason
    setattr(model[0], option, type(model[0]).__dict__[option])
    assert restore(model)


def test_backend_is_given_to_every_replaced_module_and_gone_after_restore():
    model = Model()
    replace(model, backend="reference")
    assert all(m.backend == "reference" for m in recurrent(model))
    restore(model)
    assert not any(hasattr(m, "backend") for m in recurrent(model))


def test_unknown_backend_is_refused_before_anything_changes():
    model = Model()
    with pytest.raises(rnnlm_kernels.BackendError, match="abacus"):
        replace(model, backend="abacus")
    assert type(model.lstm) is torch.nn.LSTM


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copy_of_a_replaced_model_works_and_can_be_restored(copied):
    model = torch.nn.Sequential(torch.nn.LSTM(3, 4))
    replace(model)
    twin = copied(model)
    x = torch.randn(2, 2, 3)
    assert_same(twin(x), model(x), tolerance=0)
    assert restore(twin)
    assert type(twin[0]) is torch.nn.LSTM
    assert type(model[0]) is rnnlm_kernels.LSTM


def test_replaced_layer_keeps_no_second_list_of_weights():
    layer = torch.nn.LSTM(3, 4)
    replace(layer)
    assert "_flat_weights" not in layer.__dict__
    layer.weight_hh_l0 = torch.nn.Parameter(torch.zeros(16, 4))
    restore(layer)
    assert layer._flat_weights[1] is layer.weight_hh_l0


def test_weight_dropped_layer_is_replaced_and_keeps_its_weights():
    layer = torch.nn.LSTM(3, 4)
    raw = layer.weight_hh_l0
    del layer.weight_hh_l0
    layer.weight_hh_l0 = raw * 0
    x = torch.randn(2, 2, 3)
    expected = layer(x)
    assert replace(layer)
    assert_same(layer(x), expected, tolerance=1e-5)
    assert restore(layer)
    assert_same(layer(x), expected, tolerance=0)


def test_state_dict_is_unchanged():
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    replace(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    restore(model)
    assert list(model.state_dict()) == list(before)


def test_report_reads_as_one_line_per_module():
    model = torch.nn.ModuleDict(
        {"rnn": torch.nn.LSTM(3, 4, batch_first=True), "old": torch.nn.RNN(3, 4)}
    )
    report = replace(model)
    assert isinstance(report, Report)
    assert str(report).splitlines() == [
        "rnn: torch.nn.LSTM(3, 4, batch_first=True) -> rnnlm_kernels.LSTM(3, 4, batch_first=True)",
        "old: torch.nn.RNN(3, 4) left alone: there is no fused kernel for Elman networks",
    ]


def test_replaced_model_under_no_grad_gives_the_same():
    model = Model().double().eval()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    expected = model(x).detach()
    replace(model)
    with torch.inference_mode():
        assert_same(flat(model(x)), flat(expected))
