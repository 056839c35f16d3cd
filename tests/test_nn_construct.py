"""Constructors, parameters, and text of the modules equal those of ``torch.nn``."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from nn_pairs import CELLS, LAYERS, layer_cases, pair, raised, refusal

import rnnlm_kernels
import rnnlm_kernels.nn

BAD_ARGUMENTS = {
    "dropout-above-one": ((3, 4), {"dropout": 1.5}),
    "dropout-negative": ((3, 4), {"dropout": -0.1}),
    "dropout-bool": ((3, 4), {"dropout": True}),
    "dropout-text": ((3, 4), {"dropout": "a"}),
    "bias-int": ((3, 4), {"bias": 1}),
    "batch-first-int": ((3, 4), {"batch_first": 1}),
    "input-size-float": ((3.0, 4), {}),
    "input-size-zero": ((0, 4), {}),
    "input-size-negative": ((-1, 4), {}),
    "hidden-size-float": ((3, 4.0), {}),
    "hidden-size-zero": ((3, 0), {}),
    "num-layers-zero": ((3, 4), {"num_layers": 0}),
}
# What torch 2.6 takes, and newer versions refuse.
REFUSED_BY_NEWER_TORCH = ("bias-int", "batch-first-int", "input-size-zero")
BAD_PROJECTIONS = {
    "proj-size-negative": {"proj_size": -1},
    "proj-size-equals-hidden-size": {"proj_size": 4},
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_constructor_refuses_what_torch_refuses_with_its_type_and_message(kind, case):
    args, options = BAD_ARGUMENTS[case]
    expected = refusal(lambda: getattr(torch.nn, kind)(*args, **options))
    assert expected is not None or case in REFUSED_BY_NEWER_TORCH
    assert refusal(lambda: getattr(rnnlm_kernels, kind)(*args, **options)) == expected


@pytest.mark.parametrize("options", BAD_PROJECTIONS.values(), ids=BAD_PROJECTIONS)
def test_lstm_refuses_projection_with_torchs_type_and_message(options):
    expected = raised(lambda: torch.nn.LSTM(3, 4, **options))
    assert raised(lambda: rnnlm_kernels.LSTM(3, 4, **options)) == expected


def test_gru_refuses_proj_size_by_keyword_with_torchs_type_and_message():
    expected = raised(lambda: torch.nn.GRU(3, 4, proj_size=2))
    assert raised(lambda: rnnlm_kernels.GRU(3, 4, proj_size=2)) == expected


def test_gru_refuses_positional_proj_size_where_torch_takes_it():
    args = (10, 20, 1, True, False, 0.0, False, 5)
    assert torch.nn.GRU(*args).proj_size == 5  # the bug this guards against
    expected = raised(lambda: torch.nn.GRU(3, 4, proj_size=2))
    assert raised(lambda: rnnlm_kernels.GRU(*args)) == expected


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_unknown_argument_is_refused_by_name(kind):
    kind_raised, message = raised(lambda: getattr(rnnlm_kernels, kind)(3, 4, colour="red"))
    assert kind_raised is TypeError
    assert "colour" in message


@pytest.mark.parametrize("kind", ["GRU", "GRUCell"])
def test_unknown_reset_is_refused_by_name(kind):
    with pytest.raises(ValueError, match=r"reset should be one of .*'after'.*got 'during'"):
        getattr(rnnlm_kernels, kind)(3, 4, reset="during")


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_unknown_backend_is_refused_by_name(kind):
    with pytest.raises(rnnlm_kernels.BackendError, match="abacus"):
        getattr(rnnlm_kernels, kind)(3, 4, backend="abacus")


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_with_one_layer_warns_as_torch_does(kind):
    messages = []
    for namespace in (torch.nn, rnnlm_kernels):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            getattr(namespace, kind)(3, 4, dropout=0.5)
        messages.append([str(w.message) for w in caught])
    assert messages[0] == messages[1]
    assert "dropout option adds dropout after all but last" in messages[0][0]


@pytest.mark.parametrize("kind", LAYERS)
def test_bool_sizes_and_any_bidirectional_are_accepted_as_in_torch(kind):
    ours = getattr(rnnlm_kernels, kind)(True, 4, bidirectional=1)
    theirs = getattr(torch.nn, kind)(True, 4, bidirectional=1)
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]


@pytest.mark.parametrize("kind", CELLS)
def test_cells_validate_as_little_as_torchs(kind):
    assert getattr(rnnlm_kernels, kind)(3, 0).weight_hh.shape[1] == 0
    assert getattr(rnnlm_kernels, kind)(3, 4, bias=1).bias_ih is not None


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_positional_arguments_come_in_torchs_order(kind):
    if kind == "LSTM":
        args = (3, 8, 2, False, True, 0.25, True, 4, "cpu", torch.float64)
        names = "input_size hidden_size num_layers bias batch_first dropout bidirectional proj_size"
    elif kind == "GRU":
        args = (3, 8, 2, False, True, 0.25, True)
        names = "input_size hidden_size num_layers bias batch_first dropout bidirectional"
    else:
        args = (3, 8, False, "cpu", torch.float64)
        names = "input_size hidden_size bias"
    ours, theirs = (getattr(space, kind)(*args) for space in (rnnlm_kernels, torch.nn))
    for name in names.split():
        assert getattr(ours, name) == getattr(theirs, name), name
    assert next(ours.parameters()).dtype == next(theirs.parameters()).dtype


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_signature_names_device_so_skip_init_works(kind):
    cls = getattr(rnnlm_kernels, kind)
    assert {"device", "dtype"} <= set(inspect.signature(cls).parameters)
    layer = torch.nn.utils.skip_init(cls, 3, 4)
    assert [p.shape for p in layer.parameters()] == [p.shape for p in cls(3, 4).parameters()]


@pytest.mark.parametrize(("kind", "options"), layer_cases())
def test_layer_initialisation_equals_torchs_under_the_same_seed(kind, options):
    layers, next_draws = [], []
    for namespace in (torch.nn, rnnlm_kernels):
        torch.manual_seed(0)
        layers.append(getattr(namespace, kind)(3, 5, **options))
        next_draws.append(torch.rand(1))
    for (name, theirs), (_, ours) in zip(*(m.named_parameters() for m in layers), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(*next_draws)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_cell_initialisation_equals_torchs_under_the_same_seed(kind, bias):
    cells = []
    for namespace in (torch.nn, rnnlm_kernels):
        torch.manual_seed(0)
        cells.append(getattr(namespace, kind)(3, 5, bias=bias))
    for (name, theirs), (_, ours) in zip(*(m.named_parameters() for m in cells), strict=True):
        assert torch.equal(ours, theirs), name


def test_first_initial_weights_are_the_known_ones():
    torch.manual_seed(0)
    weight = rnnlm_kernels.LSTM(2, 2).weight_ih_l0.flatten()[:3]
    torch.testing.assert_close(weight, torch.tensor([-0.0053, 0.3793, -0.5820]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", LAYERS)
def test_reset_parameters_draws_within_one_over_sqrt_hidden(kind):
    layer = getattr(rnnlm_kernels, kind)(3, 16, num_layers=2)
    before = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    for name, value in layer.state_dict().items():
        assert not torch.equal(value, before[name]), name
        assert value.abs().max() <= 0.25, name


@pytest.mark.parametrize(("kind", "options"), layer_cases())
def test_state_dict_has_torchs_names_in_torchs_order(kind, options):
    theirs, ours = pair(kind, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize(("kind", "options"), layer_cases())
def test_state_dict_is_exchanged_both_ways(kind, options, assign):
    theirs, ours = (
        getattr(namespace, kind)(3, 5, **options) for namespace in (torch.nn, rnnlm_kernels)
    )
    x = torch.randn(4, 2, 3)
    ours.load_state_dict(theirs.state_dict(), assign=assign)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    ours.reset_parameters()
    theirs.load_state_dict(ours.state_dict(), assign=assign)
    torch.testing.assert_close(theirs(x)[0], ours(x)[0])


@pytest.mark.parametrize("kind", CELLS)
def test_cell_state_dict_is_exchanged_both_ways(kind):
    theirs, ours = (getattr(namespace, kind)(3, 5) for namespace in (torch.nn, rnnlm_kernels))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("kind", LAYERS)
def test_state_dict_of_another_shape_is_refused_as_in_torch(kind):
    theirs, ours = (getattr(namespace, kind)(3, 5) for namespace in (torch.nn, rnnlm_kernels))
    wrong = getattr(torch.nn, kind)(4, 5).state_dict()
    expected = raised(lambda: theirs.load_state_dict(wrong))
    assert raised(lambda: ours.load_state_dict(wrong)) == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bias": False, "batch_first": True, "dropout": 0.1},
        {"bidirectional": True},
    ],
    ids=["defaults", "many", "bidirectional"],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_repr_equals_torchs(kind, options):
    theirs, ours = pair(kind, **options)
    assert repr(ours) == repr(theirs)


def test_repr_of_projection_equals_torchs():
    options = {
        "proj_size": 2,
        "num_layers": 2,
        "bias": False,
        "batch_first": True,
        "dropout": 0.1,
        "bidirectional": True,
    }
    theirs, ours = pair("LSTM", **options)
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("kind", CELLS)
def test_cell_repr_equals_torchs(kind, bias):
    theirs, ours = pair(kind, bias=bias)
    assert repr(ours) == repr(theirs)


def test_repr_shows_own_options_only_when_set():
    assert repr(rnnlm_kernels.GRU(3, 4, reset="before")) == "GRU(3, 4, reset='before')"
    assert repr(rnnlm_kernels.GRUCell(3, 4, reset="before")) == "GRUCell(3, 4, reset='before')"
    layer = rnnlm_kernels.LSTM(3, 4, backend="reference", return_cells=True)
    assert repr(layer) == "LSTM(3, 4, backend='reference', return_cells=True)"


@pytest.mark.parametrize(("kind", "options"), layer_cases())
def test_attributes_equal_torchs(kind, options):
    theirs, ours = pair(kind, **options)
    names = (*torch.nn.LSTM.__constants__, "_flat_weights_names", "_all_weights")
    for name in names:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.__constants__ == theirs.__constants__
    assert ours.__jit_unused_properties__ == theirs.__jit_unused_properties__
    assert [[p.shape for p in layer] for layer in ours.all_weights] == [
        [p.shape for p in layer] for layer in theirs.all_weights
    ]
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    assert len(ours._flat_weight_refs) == len(ours._flat_weights)


@pytest.mark.parametrize("kind", LAYERS)
def test_torchs_methods_can_be_called(kind):
    theirs, ours = pair(kind, batch_first=True)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    assert ours.get_expected_hidden_size(x, None) == theirs.get_expected_hidden_size(x, None)
    h = torch.zeros(1, 4, 5)
    hx = h if kind == "GRU" else (h, h)
    ours.check_input(x, None)
    ours.check_forward_args(x, hx, None)
    ours.check_hidden_size(h, (1, 4, 5))
    order = torch.tensor([1, 0, 3, 2])
    for permutation in (None, order):
        permuted = ours.permute_hidden(hx, permutation)
        assert type(permuted) is type(theirs.permute_hidden(hx, permutation))
    if kind == "LSTM":
        assert ours.get_expected_cell_size(x, None) == theirs.get_expected_cell_size(x, None)
        wrong = (h, torch.zeros(1, 4, 6))
        expected = raised(lambda: theirs.check_forward_args(x, wrong, None))
        assert raised(lambda: ours.check_forward_args(x, wrong, None)) == expected


@pytest.mark.parametrize("kind", LAYERS)
def test_flatten_parameters_changes_nothing_and_returns_none(kind):
    layer = getattr(rnnlm_kernels, kind)(3, 4, num_layers=2)
    before = [(p, p.data_ptr()) for p in layer.parameters()]
    assert layer.flatten_parameters() is None
    assert all(
        p is q and p.data_ptr() == at for p, (q, at) in zip(layer.parameters(), before, strict=True)
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_is_an_rnnbase_but_not_torchs_class(kind):
    layer = getattr(rnnlm_kernels, kind)(3, 4)
    assert isinstance(layer, torch.nn.RNNBase)
    # torch.compile refuses to trace instances of these.
    assert not isinstance(layer, (torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU))


@pytest.mark.parametrize("kind", CELLS)
def test_cell_is_an_rnncellbase(kind):
    assert isinstance(getattr(rnnlm_kernels, kind)(3, 4), torch.nn.RNNCellBase)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_explain_names_the_module_and_a_backend(kind):
    text = rnnlm_kernels.explain(getattr(rnnlm_kernels, kind)(3, 4))
    assert f"{kind}(3, 4)" in text
    assert "reference" in text


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_public_names_are_the_same_object(kind):
    assert getattr(rnnlm_kernels, kind) is getattr(rnnlm_kernels.nn, kind)
