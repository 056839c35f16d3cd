"""Outputs, layouts, packing, and dtypes of LSTM and GRU equal those of ``torch.nn``."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_pairs import LAYERS, assert_same, flat, layer_cases, pair, raised, states
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

import rnnlm_kernels

T, B, IN, H = 4, 3, 3, 5
LENGTHS = {"sorted": (5, 3, 3, 1), "unsorted": (3, 1, 5, 3), "equal": (4, 4), "one-row": (3,)}


def sequence(layer, batch=B, steps=T, dtype=torch.float64):
    shape = (batch, steps) if layer.batch_first else (steps, batch)
    return torch.randn(*shape, layer.input_size, dtype=dtype)


def packed(lengths, dtype=torch.float64):
    rows = [torch.randn(n, IN, dtype=dtype) for n in lengths]
    return pack_sequence(rows, enforce_sorted=list(lengths) == sorted(lengths, reverse=True))


@pytest.mark.parametrize("given_states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize(("kind", "options"), layer_cases())
def test_batched_forward_equals_torchs(kind, options, given_states):
    theirs, ours = pair(kind, **options)
    x = sequence(theirs)
    hx = states(theirs, B) if given_states else None
    assert_same(ours(x, hx), theirs(x, hx))


@pytest.mark.parametrize("given_states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize(("kind", "options"), layer_cases())
def test_unbatched_forward_equals_torchs_and_ignores_batch_first(kind, options, given_states):
    theirs, ours = pair(kind, **options)
    x = torch.randn(T, IN, dtype=torch.float64)
    hx = states(theirs, None) if given_states else None
    result = ours(x, hx)
    assert_same(result, theirs(x, hx))
    assert result[0].dim() == 2
    assert all(state.dim() == 2 for state in flat(result[1]))


@pytest.mark.parametrize("given_states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("kind", "options"), layer_cases())
def test_packed_forward_equals_torchs(kind, options, lengths, given_states):
    theirs, ours = pair(kind, **options)
    x = packed(lengths)
    hx = states(theirs, len(lengths)) if given_states else None
    result, expected = ours(x, hx), theirs(x, hx)
    assert_same(result, expected)
    assert isinstance(result[0], PackedSequence)
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        mine, other = getattr(result[0], field), getattr(expected[0], field)
        assert (mine is None and other is None) or torch.equal(mine, other), field


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_rows_equal_the_rows_alone(kind):
    _, layer = pair(kind, bidirectional=True, num_layers=2)
    rows = [torch.randn(n, IN, dtype=torch.float64) for n in (2, 5, 3)]
    output, hidden = layer(pack_sequence(rows, enforce_sorted=False))
    padded, lengths = pad_packed_sequence(output)
    for b, row in enumerate(rows):
        alone, alone_hidden = layer(row)
        torch.testing.assert_close(padded[: lengths[b], b], alone)
        for together, single in zip(flat(hidden), flat(alone_hidden), strict=True):
            torch.testing.assert_close(together[:, b], single)


@pytest.mark.parametrize("kind", LAYERS)
def test_reverse_direction_starts_at_each_rows_own_end(kind):
    _, layer = pair(kind, bidirectional=True)
    x = torch.randn(5, 2, IN, dtype=torch.float64)
    lengths = torch.tensor([5, 2])
    first, _ = layer(pack_padded_sequence(x, lengths))
    x[2:, 1] = 1e3  # padding of the short row
    second, _ = layer(pack_padded_sequence(x, lengths))
    assert torch.equal(first.data, second.data)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    kind=st.sampled_from(LAYERS),
)
def test_any_lengths_in_any_order_equal_torchs(kind, lengths, layers, bidirectional):
    theirs, ours = pair(kind, num_layers=layers, bidirectional=bidirectional)
    rows = [torch.randn(n, IN, dtype=torch.float64) for n in lengths]
    x = pack_sequence(rows, enforce_sorted=False)
    hx = states(theirs, len(lengths))
    assert_same(ours(x, hx), theirs(x, hx))


@pytest.mark.parametrize("kind", LAYERS)
def test_result_containers_are_torchs_also_for_a_list_of_states(kind):
    theirs, ours = pair(kind)
    hx = states(theirs, B)
    given_list = list(hx) if kind == "LSTM" else hx
    result = ours(sequence(ours), given_list)
    assert type(result) is tuple
    assert len(result) == 2
    assert type(result[1]) is (tuple if kind == "LSTM" else torch.Tensor)


@pytest.mark.parametrize("kind", LAYERS)
def test_batch_first_output_is_a_transposed_view_as_in_torch(kind):
    theirs, ours = pair(kind, IN, 20, batch_first=True)
    x = torch.randn(3, 5, IN, dtype=torch.float64)
    assert ours(x)[0].stride() == theirs(x)[0].stride() == (20, 60, 1)


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
@pytest.mark.parametrize("kind", LAYERS)
def test_states_never_carry_the_batch_first(kind, batch_first):
    layer = getattr(rnnlm_kernels, kind)(IN, H, 2, batch_first=batch_first)
    _, hidden = layer(sequence(layer, dtype=torch.float32))
    assert all(state.shape == (2, B, H) for state in flat(hidden))


@pytest.mark.parametrize("kind", LAYERS)
def test_final_states_do_not_alias_the_output_or_the_initial_states(kind):
    layer = getattr(rnnlm_kernels, kind)(IN, H).requires_grad_(False)
    x, hx = torch.randn(1, B, IN), states(layer, B, torch.float32)
    output, hidden = layer(x, hx)
    kept = output.clone(), [state.clone() for state in flat(hx)]
    for state in flat(hidden):
        state.fill_(7)
    assert torch.equal(output, kept[0])
    assert all(torch.equal(a, b) for a, b in zip(flat(hx), kept[1], strict=True))


@pytest.mark.parametrize("kind", LAYERS)
def test_inputs_are_not_written_to(kind):
    layer = getattr(rnnlm_kernels, kind)(IN, H, 2)
    x, hx = torch.randn(T, B, IN), states(layer, B, torch.float32)
    before = [tensor.clone() for tensor in (x, *flat(hx))]
    layer(x, hx)
    assert all(torch.equal(a, b) for a, b in zip((x, *flat(hx)), before, strict=True))


@pytest.mark.parametrize("kind", LAYERS)
def test_empty_batch_gives_empty_results_of_torchs_shapes(kind):
    theirs, ours = pair(kind, num_layers=2, bidirectional=True)
    x = torch.randn(T, 0, IN, dtype=torch.float64)
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_one_step_equals_torchs(kind):
    theirs, ours = pair(kind, num_layers=2, bidirectional=True)
    x = torch.randn(1, 1, IN, dtype=torch.float64)
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("layout", ["transposed", "expanded-batch", "expanded-time", "strided"])
@pytest.mark.parametrize("kind", LAYERS)
def test_any_strides_of_input_and_states_give_the_same(kind, layout):
    _, layer = pair(kind)
    x = {
        "transposed": torch.randn(B, T, IN, dtype=torch.float64).transpose(0, 1),
        "expanded-batch": torch.randn(T, 1, IN, dtype=torch.float64).expand(T, B, IN),
        "expanded-time": torch.randn(1, B, IN, dtype=torch.float64).expand(T, B, IN),
        "strided": torch.randn(T, B, 2 * IN, dtype=torch.float64)[..., ::2],
    }[layout]
    h = torch.randn(1, H, B, dtype=torch.float64).transpose(1, 2)
    hx = h if kind == "GRU" else (h, torch.randn(1, 1, H, dtype=torch.float64).expand(1, B, H))
    plain = hx.contiguous() if kind == "GRU" else tuple(s.contiguous() for s in hx)
    assert_same(layer(x, hx), layer(x.contiguous(), plain))


@pytest.mark.parametrize("kind", LAYERS)
def test_nan_in_one_row_stays_in_that_row_as_in_torch(kind):
    theirs, ours = pair(kind, bidirectional=True)
    x = torch.randn(T, B, IN, dtype=torch.float64)
    x[1, 1, 0] = torch.nan
    x[2, 2, 1] = torch.inf
    result, expected = ours(x), theirs(x)
    for a, b in zip(flat(result), flat(expected), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
        assert not a[:, 0].isnan().any()


# --- dropout ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_acts_between_layers_in_training_only(kind):
    layer = getattr(rnnlm_kernels, kind)(IN, H, 2, dropout=0.5)
    x = torch.randn(T, B, IN)
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])
    layer.train()
    assert not torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_draws_torchs_mask_under_the_same_seed(kind):
    theirs, ours = pair(kind, num_layers=3, dropout=0.4, bidirectional=True)
    x = sequence(ours)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(1)
        results.append(layer(x))
    assert_same(*results)


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_of_one_silences_all_but_the_first_layer(kind):
    theirs, ours = pair(kind, num_layers=2, dropout=1.0)
    x = sequence(ours)
    assert_same(ours(x), theirs(x))
    assert torch.equal(ours(x)[0], ours(torch.randn_like(x))[0])


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_leaves_the_last_layers_output_alone(kind):
    with pytest.warns(UserWarning, match="dropout option"):
        layer = getattr(rnnlm_kernels, kind)(IN, H, dropout=0.9)
    x = torch.randn(T, B, IN)
    assert torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_acts_on_packed_input(kind):
    theirs, ours = pair(kind, num_layers=2, dropout=0.4)
    x = packed(LENGTHS["unsorted"])
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(1)
        results.append(layer(x))
    assert_same(*results)


# --- options torch does not have ----------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "bidirectional"])
@pytest.mark.parametrize("proj_size", [0, 2], ids=["plain", "projection"])
def test_return_cells_gives_every_steps_cell_state(batch_first, bidirectional, proj_size):
    _, layer = pair(
        "LSTM",
        num_layers=2,
        batch_first=batch_first,
        bidirectional=bidirectional,
        proj_size=proj_size,
    )
    x = sequence(layer)
    plain = layer(x)
    layer.return_cells = True
    output, (h_n, c_n), cells = layer(x)
    assert_same((output, (h_n, c_n)), plain)
    steps = cells.transpose(0, 1) if batch_first else cells
    assert steps.shape == (T, B, H * (1 + bidirectional))
    assert torch.equal(steps[-1, :, :H], c_n[2 if bidirectional else 1])
    if bidirectional:
        assert torch.equal(steps[0, :, H:], c_n[3])


def test_return_cells_equals_the_cell_states_of_a_cell_loop():
    _, layer = pair("LSTM")
    layer.return_cells = True
    cell = torch.nn.LSTMCell(IN, H, dtype=torch.float64)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = torch.randn(T, B, IN, dtype=torch.float64)
    h, c = torch.zeros(2, B, H, dtype=torch.float64)
    expected = []
    for step in x:
        h, c = cell(step, (h, c))
        expected.append(c)
    torch.testing.assert_close(layer(x)[2], torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_return_cells_of_packed_input_is_packed_and_equals_each_row_alone():
    _, layer = pair("LSTM", bidirectional=True)
    layer.return_cells = True
    rows = [torch.randn(n, IN, dtype=torch.float64) for n in (2, 4, 3)]
    cells = layer(pack_sequence(rows, enforce_sorted=False))[2]
    assert isinstance(cells, PackedSequence)
    padded, lengths = pad_packed_sequence(cells)
    for b, row in enumerate(rows):
        torch.testing.assert_close(padded[: lengths[b], b], layer(row)[2])


def test_return_cells_of_unbatched_input_is_unbatched():
    layer = rnnlm_kernels.LSTM(IN, H, return_cells=True)
    assert layer(torch.randn(T, IN))[2].shape == (T, H)


def test_return_cells_is_differentiable():
    _, layer = pair("LSTM")
    layer.return_cells = True
    x = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[2], (x,))


def test_reset_before_follows_the_equations_of_cho():
    layer = rnnlm_kernels.GRU(IN, H, dtype=torch.float64, reset="before")
    x = torch.randn(T, B, IN, dtype=torch.float64)
    h = torch.zeros(B, H, dtype=torch.float64)
    w_r, w_z, w_n = layer.weight_ih_l0.chunk(3)
    u_r, u_z, u_n = layer.weight_hh_l0.chunk(3)
    b_r, b_z, b_n = layer.bias_ih_l0.chunk(3)
    d_r, d_z, d_n = layer.bias_hh_l0.chunk(3)
    expected = []
    for step in x:
        r = torch.sigmoid(step @ w_r.T + b_r + h @ u_r.T + d_r)
        z = torch.sigmoid(step @ w_z.T + b_z + h @ u_z.T + d_z)
        n = torch.tanh(step @ w_n.T + b_n + (r * h) @ u_n.T + d_n)
        h = (1 - z) * n + z * h
        expected.append(h)
    torch.testing.assert_close(layer(x)[0], torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_backend_reference_equals_the_automatic_choice(kind):
    _, layer = pair(kind, num_layers=2, bidirectional=True)
    x = sequence(layer)
    automatic = layer(x)
    layer.backend = "reference"
    assert_same(layer(x), automatic)


# --- dtypes, autocast, determinism ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 4e-3)],
    ids=["float64", "float32", "bfloat16", "float16"],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_dtype_gives_its_own_dtype_near_the_float64_numbers(kind, dtype, tolerance):
    exact, ours = pair(kind, num_layers=2)
    x = torch.randn(T, B, IN, dtype=torch.float64)
    result = ours.to(dtype)(x.to(dtype))
    assert all(tensor.dtype == dtype for tensor in flat(result))
    for a, b in zip(flat(result), flat(exact(x)), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("half", torch.float16), ("bfloat16", torch.bfloat16), ("double", torch.float64)],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_half_bfloat16_and_double_convert_the_weights_in_place(kind, method, dtype):
    layer = getattr(rnnlm_kernels, kind)(IN, H)
    weight = layer.weight_hh_l0
    assert getattr(layer, method)() is layer
    assert layer.weight_hh_l0 is weight
    assert all(w.dtype == dtype for w in layer._flat_weights)
    assert layer(torch.randn(T, B, IN, dtype=dtype))[0].dtype == dtype


@pytest.mark.parametrize("kind", LAYERS)
def test_default_states_have_the_inputs_dtype(kind):
    layer = getattr(rnnlm_kernels, kind)(IN, H, dtype=torch.bfloat16)
    assert all(s.dtype == torch.bfloat16 for s in flat(layer(torch.randn(T, B, IN).bfloat16())[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_casts_input_states_and_weights_and_keeps_float32_gradients(kind, dtype):
    exact, ours = pair(kind, num_layers=2, bidirectional=True)
    ours = ours.float()
    x, hx = torch.randn(T, B, IN), states(ours, B, torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        result = ours(x, hx)
    assert all(tensor.dtype == dtype for tensor in flat(result))
    wide = hx.double() if kind == "GRU" else tuple(s.double() for s in hx)
    for a, b in zip(flat(result), flat(exact(x.double(), wide)), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0.03, atol=0.03)
    sum(tensor.float().sum() for tensor in flat(result)).backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_equals_running_in_the_autocast_dtype(kind):
    layer = getattr(rnnlm_kernels, kind)(IN, H, 2)
    x = torch.randn(T, B, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = layer(x)
    assert_same(cast, layer.bfloat16()(x.bfloat16()), tolerance=0)


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_accepts_mixed_input_dtypes_as_torch_does(kind):
    layer = getattr(rnnlm_kernels, kind)(IN, H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(T, B, IN, dtype=torch.float16))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_leaves_float64_alone(kind):
    theirs, ours = pair(kind)
    x = sequence(ours)
    expected = theirs(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(ours(x), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_acts_on_packed_input(kind):
    layer = getattr(rnnlm_kernels, kind)(IN, H, bidirectional=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = layer(packed(LENGTHS["unsorted"], torch.float32))
    assert output.data.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_of_another_device_changes_nothing(kind):
    layer = getattr(rnnlm_kernels, kind)(IN, H).to("meta")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(T, B, IN, device="meta"))[0].dtype == torch.float32


@pytest.mark.parametrize("kind", LAYERS)
def test_deterministic_mode_is_accepted_and_runs_repeat_bit_for_bit(kind):
    layer = getattr(rnnlm_kernels, kind)(IN, H, 2, bidirectional=True)
    x = torch.randn(T, B, IN)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            layer.zero_grad()
            output, _ = layer(x)
            output.sum().backward()
            runs.append([output, *(p.grad.clone() for p in layer.parameters())])
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("kind", LAYERS)
def test_meta_device_gives_shapes(kind):
    layer = getattr(rnnlm_kernels, kind)(IN, H, 2, device="meta")
    output, hidden = layer(torch.randn(T, B, IN, device="meta"))
    assert output.shape == (T, B, H)
    assert all(state.shape == (2, B, H) and state.is_meta for state in flat(hidden))


# --- refused ------------------------------------------------------------------------------------


def _bad_dense(kind):
    """Calls with a wrong input, by a readable id: layer -> call."""
    h = torch.zeros(1, 3, 20)
    two = (lambda a, b=None: a) if kind == "GRU" else (lambda a, b=None: (a, h if b is None else b))
    x = torch.randn(5, 3, 10)
    return {
        "input-1d": lambda m: m(torch.randn(10)),
        "input-4d": lambda m: m(torch.randn(1, 2, 3, 10)),
        "input-size": lambda m: m(torch.randn(5, 3, 11)),
        "input-size-unbatched": lambda m: m(torch.randn(5, 11)),
        "input-dtype-double": lambda m: m(x.double()),
        "input-dtype-integer": lambda m: m(torch.ones(5, 3, 10, dtype=torch.long)),
        "empty-sequence": lambda m: m(torch.randn(0, 3, 10)),
        "hidden-batch": lambda m: m(x, two(torch.zeros(1, 4, 20))),
        "hidden-layers": lambda m: m(x, two(torch.zeros(2, 3, 20))),
        "hidden-size": lambda m: m(x, two(torch.zeros(1, 3, 21))),
        "hidden-2d-for-batched": lambda m: m(x, two(torch.zeros(3, 20), torch.zeros(3, 20))),
        "hidden-3d-for-unbatched": lambda m: m(torch.randn(5, 10), two(h, h)),
        "device-of-parameters": lambda m: m.to("meta")(x),
    }


def _in_newer_words(refusal):
    """torch's refusal of an input; torch 2.6 says less about a wrong dtype than newer versions."""
    error, message = refusal
    return error, re.sub(
        r"^input must have the type (\S+), got type (\S+)$",
        r"RNN input dtype (\2) does not match weight dtype (\1). "
        r"Convert input: input.to(\1), or convert model: model.to(\2)",
        message,
    )


@pytest.mark.parametrize("case", _bad_dense("GRU"))
@pytest.mark.parametrize("kind", LAYERS)
def test_wrong_input_is_refused_with_torchs_type_and_message(kind, case):
    call = _bad_dense(kind)[case]
    theirs, ours = pair(kind, 10, 20, dtype=torch.float32)
    if case == "device-of-parameters":
        # torch's message names the two devices the other way round for some layers.
        error, message = raised(lambda: call(ours))
        assert error is RuntimeError
        assert message == (
            "Input and parameter tensors are not at the same device, found input tensor at cpu "
            "and parameter tensor at meta"
        )
        return
    assert raised(lambda: call(ours)) == _in_newer_words(raised(lambda: call(theirs)))


def test_wrong_cell_state_is_refused_with_torchs_type_and_message():
    theirs, ours = pair("LSTM", 10, 20, dtype=torch.float32)
    x, h = torch.randn(5, 3, 10), torch.zeros(1, 3, 20)
    for c in (torch.zeros(1, 4, 20), torch.zeros(1, 3, 21), torch.zeros(3, 20)):
        expected = raised(lambda c=c: theirs(x, (h, c)))
        assert raised(lambda c=c: ours(x, (h, c))) == expected


def test_states_of_a_projected_lstm_are_refused_with_torchs_type_and_message():
    theirs, ours = pair("LSTM", 10, 20, proj_size=4, dtype=torch.float32)
    x, h, c = torch.randn(5, 3, 10), torch.zeros(1, 3, 4), torch.zeros(1, 3, 20)
    assert ours(x, (h, c))[0].shape == (5, 3, 4)
    for hx in ((c, c), (h, h)):
        assert raised(lambda hx=hx: ours(x, hx)) == raised(lambda hx=hx: theirs(x, hx))


@pytest.mark.parametrize("kind", LAYERS)
def test_input_on_another_device_is_refused_with_torchs_words(kind):
    _, layer = pair(kind, 10, 20, dtype=torch.float32)
    error, message = raised(lambda: layer(torch.randn(5, 3, 10, device="meta")))
    assert error is RuntimeError
    assert message == (
        "Input and parameter tensors are not at the same device, found input tensor at meta and "
        "parameter tensor at cpu"
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_input_of_a_wrong_size_is_refused_where_torch_reads_garbage(kind):
    layer = getattr(rnnlm_kernels, kind)(10, 20)
    for features in (9, 11, 64):
        for lengths in ((4, 4), (4, 2)):
            x = pack_sequence([torch.randn(n, features) for n in lengths])
            with pytest.raises(
                RuntimeError,
                match=rf"input.size\(-1\) must be equal to input_size. Expected 10, got {features}",
            ):
                layer(x)


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_input_of_a_wrong_dtype_is_refused_with_torchs_words(kind):
    theirs, layer = pair(kind, 10, 20, dtype=torch.float32)
    x = torch.randn(4, 2, 10).double()
    expected = _in_newer_words(raised(lambda: theirs(x)))
    assert raised(lambda: layer(pack_padded_sequence(x, torch.tensor([4, 2])))) == expected


@pytest.mark.parametrize("rows", [1, 2, 4, 6])
@pytest.mark.parametrize("order", ["sorted", "unsorted"])
@pytest.mark.parametrize("kind", LAYERS)
def test_packed_states_of_a_wrong_batch_are_refused_where_torch_takes_the_first_rows(
    kind, order, rows
):
    _, layer = pair(kind)
    x = packed((3, 2, 1) if order == "sorted" else (2, 3, 1))
    with pytest.raises(RuntimeError, match=rf"size \(1, 3, 5\), got \[1, {rows}, 5\]"):
        layer(x, states(layer, rows))


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_states_without_layer_dimension_are_refused(kind):
    _, layer = pair(kind)
    with pytest.raises(RuntimeError, match=r"size \(1, 3, 5\), got \[3, 5\]"):
        layer(packed((3, 2, 1)), states(layer, 3)[0] if kind == "GRU" else (torch.zeros(3, 5),) * 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("which", ["h_0", "c_0"])
def test_lstm_states_of_another_dtype_are_refused_by_name(which, dtype):
    layer = rnnlm_kernels.LSTM(IN, H)
    hx = {"h_0": torch.zeros(1, B, H), "c_0": torch.zeros(1, B, H)}
    hx[which] = hx[which].to(dtype)
    with pytest.raises(RuntimeError, match=rf"{which} has dtype {dtype}, expected torch.float32"):
        layer(torch.randn(T, B, IN), tuple(hx.values()))


def test_gru_state_of_another_dtype_is_refused_by_name():
    with pytest.raises(RuntimeError, match=r"hx has dtype torch.float64, expected torch.float32"):
        rnnlm_kernels.GRU(IN, H)(torch.randn(T, B, IN), torch.zeros(1, B, H).double())


@pytest.mark.parametrize("name", ["h_0", "c_0"])
def test_lstm_states_on_another_device_are_refused_by_name(name):
    hx = [torch.zeros(1, B, H), torch.zeros(1, B, H)]
    hx[name == "c_0"] = torch.zeros(1, B, H, device="meta")
    with pytest.raises(RuntimeError, match=f"{name} is on meta, expected cpu"):
        rnnlm_kernels.LSTM(IN, H)(torch.randn(T, B, IN), hx)


def test_gru_state_on_another_device_is_refused_by_name():
    with pytest.raises(RuntimeError, match="hx is on meta, expected cpu"):
        rnnlm_kernels.GRU(IN, H)(torch.randn(T, B, IN), torch.zeros(1, B, H, device="meta"))


@pytest.mark.parametrize(
    ("hx", "said"),
    [
        (torch.zeros(2, 1, B, H), r"a tensor of shape \[2, 1, 3, 5\]"),
        ((torch.zeros(1, B, H),), r"tuple of \(Tensor\)"),
        ((torch.zeros(1, B, H), None), r"tuple of \(Tensor, NoneType\)"),
        ("zeros", "str"),
    ],
    ids=["stacked-tensor", "one-state", "none-inside", "text"],
)
def test_lstm_states_of_a_wrong_type_are_refused_by_what_they_are(hx, said):
    with pytest.raises(
        TypeError, match=rf"LSTM: hx should be \(h_0, c_0\), two tensors, got {said}"
    ):
        rnnlm_kernels.LSTM(IN, H)(torch.randn(T, B, IN), hx)


def test_gru_states_of_a_wrong_type_are_refused_by_what_they_are():
    hx = (torch.zeros(1, B, H), torch.zeros(1, B, H))
    with pytest.raises(TypeError, match=r"GRU: hx should be one tensor, h_0, got tuple of \(Ten"):
        rnnlm_kernels.GRU(IN, H)(torch.randn(T, B, IN), hx)


@pytest.mark.parametrize("kind", LAYERS)
def test_input_of_a_wrong_type_is_refused_by_what_it_is(kind):
    with pytest.raises(TypeError, match=f"{kind}: input should be a Tensor or a PackedSequence"):
        getattr(rnnlm_kernels, kind)(IN, H)([[1.0, 2.0, 3.0]])


@pytest.mark.parametrize("kind", LAYERS)
def test_weights_of_a_wrong_shape_are_refused_by_name(kind):
    layer = getattr(rnnlm_kernels, kind)(IN, H)
    layer.weight_hh_l0 = torch.nn.Parameter(torch.zeros(7, 7))
    with pytest.raises(RuntimeError, match=r"w_hh"):
        layer(torch.randn(T, B, IN))


@pytest.mark.parametrize("kind", LAYERS)
def test_backend_that_cannot_run_is_refused_when_called(kind, monkeypatch):
    layer = getattr(rnnlm_kernels, kind)(IN, H)
    monkeypatch.setenv("RNNLM_BACKEND", "abacus")
    with pytest.raises(rnnlm_kernels.BackendError, match="abacus"):
        layer(torch.randn(T, B, IN))


def test_batch_sizes_that_do_not_add_up_are_refused():
    x = PackedSequence(torch.randn(5, IN), torch.tensor([2, 2]))
    with pytest.raises(RuntimeError, match="batch_sizes"):
        rnnlm_kernels.LSTM(IN, H)(x)


def test_lengths_on_a_wrong_device_are_refused_by_name():
    with pytest.raises(ValueError, match="batch_sizes should always be on CPU"):
        PackedSequence(torch.randn(5, IN), torch.tensor([3, 2]).to("meta"))
    weights = [(torch.randn(4 * H, IN), torch.randn(4 * H, H), None, None, None)]
    with pytest.raises(RuntimeError, match="batch_sizes should be an int64 tensor on the CPU"):
        rnnlm_kernels.functional.lstm(
            torch.randn(5, IN),
            (torch.zeros(1, 3, H), torch.zeros(1, 3, H)),
            weights,
            batch_sizes=torch.tensor([3, 2], device="meta"),
        )


def test_functional_refuses_a_wrong_number_of_weights():
    weights = [(torch.randn(4 * H, IN), torch.randn(4 * H, H), None, None, None)]
    with pytest.raises(ValueError, match="weights has 1 entries, expected 4"):
        rnnlm_kernels.functional.lstm(
            torch.randn(T, B, IN), None, weights, num_layers=2, bidirectional=True
        )


def test_functional_without_biases_ignores_them():
    layer = rnnlm_kernels.GRU(IN, H)
    x = torch.randn(T, B, IN)
    output, _ = rnnlm_kernels.functional.gru(x, None, layer._weights(), has_biases=False)
    for name in ("bias_ih_l0", "bias_hh_l0"):
        torch.nn.init.zeros_(getattr(layer, name))
    torch.testing.assert_close(output, layer(x)[0])
