"""LSTMCell and GRUCell: one step equals ``torch.nn``, and wrong input gets its messages."""

from __future__ import annotations

import pytest
import torch
from nn_pairs import CELLS, assert_same, flat, pair, raised, states

import rnnlm_kernels

B, IN, H = 3, 3, 5


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("given_states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("batch", [B, 1, 0, None], ids=["batch", "one-row", "empty", "unbatched"])
@pytest.mark.parametrize("kind", CELLS)
def test_step_equals_torchs(kind, batch, given_states, bias):
    theirs, ours = pair(kind, bias=bias)
    x = torch.randn(*([] if batch is None else [batch]), IN, dtype=torch.float64)
    hx = states(theirs, batch) if given_states else None
    result = ours(x, hx)
    assert_same(result, theirs(x, hx))
    assert type(result) is (tuple if kind == "LSTMCell" else torch.Tensor)


def test_lstm_cell_takes_its_states_as_a_list():
    theirs, ours = pair("LSTMCell")
    x, hx = torch.randn(B, IN, dtype=torch.float64), states(theirs, B)
    assert_same(ours(x, list(hx)), theirs(x, hx))


@pytest.mark.parametrize("kind", CELLS)
def test_hidden_size_zero_runs_as_in_torch(kind):
    theirs, ours = pair(kind, IN, 0)
    x = torch.randn(B, IN, dtype=torch.float64)
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("kind", CELLS)
def test_loop_of_steps_equals_the_layer(kind):
    _, cell = pair(kind)
    layer = getattr(rnnlm_kernels, kind.removesuffix("Cell"))(IN, H, dtype=torch.float64)
    layer.load_state_dict({f"{k}_l0": v for k, v in cell.state_dict().items()})
    x = torch.randn(6, B, IN, dtype=torch.float64)
    hx = None
    for step in x:
        hx = cell(step, hx)
    assert_same([s[0] for s in flat(layer(x)[1])], flat(hx))


def test_reset_before_cell_equals_the_layer():
    cell = rnnlm_kernels.GRUCell(IN, H, dtype=torch.float64, reset="before")
    layer = rnnlm_kernels.GRU(IN, H, dtype=torch.float64, reset="before")
    layer.load_state_dict({f"{k}_l0": v for k, v in cell.state_dict().items()})
    x, h = torch.randn(B, IN, dtype=torch.float64), torch.randn(B, H, dtype=torch.float64)
    torch.testing.assert_close(cell(x, h), layer(x[None], h[None])[1][0])
    after, _ = pair("GRUCell")
    after.load_state_dict(cell.state_dict())
    assert not torch.allclose(cell(x, h), after(x, h))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", CELLS)
def test_every_dtype_gives_its_own_dtype_near_the_float64_numbers(kind, dtype):
    exact, ours = pair(kind)
    x = torch.randn(B, IN, dtype=torch.float64)
    result = ours.to(dtype)(x.to(dtype))
    for a, b in zip(flat(result), flat(exact(x)), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", CELLS)
def test_autocast_gives_the_autocast_dtype_and_float32_gradients(kind):
    exact, ours = pair(kind)
    ours = ours.float()
    x = torch.randn(B, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = ours(x)
        result = ours(x, result)  # a loop carries the cast states on
    assert all(tensor.dtype == torch.bfloat16 for tensor in flat(result))
    expected = exact(x.double(), exact(x.double()))
    for a, b in zip(flat(result), flat(expected), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0.03, atol=0.03)
    sum(t.float().sum() for t in flat(result)).backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.parametrize("kind", CELLS)
def test_subclass_keeps_torchs_name_in_messages(kind):
    cls = type("Mine", (getattr(rnnlm_kernels, kind),), {})
    expected = raised(lambda: getattr(torch.nn, kind)(IN, H)(torch.randn(1, 1, B, IN)))
    assert raised(lambda: cls(IN, H)(torch.randn(1, 1, B, IN))) == expected


def _hx(kind, *first, second=None):
    h = torch.zeros(first)
    return h if kind == "GRUCell" else (h, torch.zeros(second or first))


BAD_CALLS = {
    "input-3d": lambda kind, m: m(torch.randn(2, 3, 10)),
    "input-0d": lambda kind, m: m(torch.tensor(1.0)),
    "input-size": lambda kind, m: m(torch.randn(3, 11)),
    "input-size-unbatched": lambda kind, m: m(torch.randn(11)),
    "hidden-3d": lambda kind, m: m(torch.randn(3, 10), _hx(kind, 1, 3, 20)),
    "hidden-4d": lambda kind, m: m(torch.randn(3, 10), _hx(kind, 1, 1, 3, 20)),
    "hidden-batch": lambda kind, m: m(torch.randn(3, 10), _hx(kind, 5, 20)),
    "hidden-size": lambda kind, m: m(torch.randn(3, 10), _hx(kind, 3, 21)),
    "hidden-size-unbatched": lambda kind, m: m(torch.randn(10), _hx(kind, 21)),
}


@pytest.mark.parametrize("case", BAD_CALLS)
@pytest.mark.parametrize("kind", CELLS)
def test_wrong_call_is_refused_with_torchs_type_and_message(kind, case):
    theirs, ours = pair(kind, 10, 20, dtype=torch.float32)
    expected = raised(lambda: BAD_CALLS[case](kind, theirs))
    assert raised(lambda: BAD_CALLS[case](kind, ours)) == expected


@pytest.mark.parametrize(
    "second", [(3, 21), (5, 20), (1, 1, 3, 20)], ids=["size", "batch", "dimensions"]
)
def test_wrong_cell_state_is_refused_with_torchs_type_and_message(second):
    theirs, ours = pair("LSTMCell", 10, 20, dtype=torch.float32)
    x, hx = torch.randn(3, 10), (torch.zeros(3, 20), torch.zeros(second))
    assert raised(lambda: ours(x, hx)) == raised(lambda: theirs(x, hx))


@pytest.mark.parametrize("kind", CELLS)
def test_state_without_the_inputs_batch_is_refused_with_both_numbers(kind):
    cell = getattr(rnnlm_kernels, kind)(10, 20)
    with pytest.raises(RuntimeError, match=r"2-D input, hidden0 should also be 2-D but got 1-D"):
        cell(torch.randn(3, 10), _hx(kind, 20))
    with pytest.raises(RuntimeError, match=r"1-D input, hidden0 should also be 1-D but got 2-D"):
        cell(torch.randn(10), _hx(kind, 1, 20))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=["double", "integer"])
def test_input_of_another_dtype_is_refused_naming_both(kind, dtype):
    cell = getattr(rnnlm_kernels, kind)(10, 20)
    with pytest.raises(ValueError, match=rf"{dtype}.* does not match weight dtype .*float32"):
        cell(torch.ones(3, 10, dtype=dtype))


@pytest.mark.parametrize("kind", CELLS)
def test_state_of_another_dtype_or_device_is_refused_by_name(kind):
    cell = getattr(rnnlm_kernels, kind)(10, 20)
    near, x = torch.zeros(3, 20), torch.randn(3, 10)
    for far, words in ((near.double(), "has dtype torch.float64"), (near.to("meta"), "is on meta")):
        name = "hx" if kind == "GRUCell" else "c_0"
        with pytest.raises(RuntimeError, match=f"{name} {words}"):
            cell(x, far if kind == "GRUCell" else (near, far))


def test_tensor_as_lstm_cell_states_is_refused_where_torch_crashes():
    # pytorch issue 193823: a segmentation fault.
    cell = rnnlm_kernels.LSTMCell(10, 20)
    with pytest.raises(TypeError, match=r"hx should be \(h_0, c_0\), two tensors, got a tensor of"):
        cell(torch.randn(3, 10), torch.zeros(2, 3, 20))


def test_tuple_as_gru_cell_state_is_refused_by_what_it_is():
    cell = rnnlm_kernels.GRUCell(10, 20)
    with pytest.raises(TypeError, match=r"hx should be one tensor, h_0, got tuple"):
        cell(torch.randn(3, 10), (torch.zeros(3, 20),))


@pytest.mark.parametrize("kind", CELLS)
def test_input_of_a_wrong_type_is_refused_by_what_it_is(kind):
    with pytest.raises(TypeError, match=f"{kind}: input should be a Tensor, got list"):
        getattr(rnnlm_kernels, kind)(10, 20)([1.0] * 10)
