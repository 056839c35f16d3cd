"""Gradients of every order and the function transforms, against ``torch.nn``."""

from __future__ import annotations

import pytest
import torch
from nn_pairs import CELLS, LAYERS, assert_same, flat, layer_cases, pair, states
from torch.nn.utils.rnn import pack_sequence

import rnnlm_kernels

T, B, IN, H = 4, 3, 3, 5


def gradients(layer, x, hx, weights):
    """Gradients of a weighted sum of all results: of x, the states, then every parameter."""
    leaves = [t.detach().clone().requires_grad_() for t in (x.data, *flat(hx))]
    given = leaves[0] if isinstance(x, torch.Tensor) else x._replace(data=leaves[0])
    again = leaves[1:] if len(leaves) > 2 else leaves[1]
    outputs = flat(layer(given, again))
    total = sum((out * w).sum() for out, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(total, [*leaves, *layer.parameters()])


def assert_same_gradients(theirs, ours, x, hx):
    weights = [torch.randn_like(out) for out in flat(theirs(x, hx))]
    names = ["x", "h0", "c0"][: 1 + len(flat(hx))] + [n for n, _ in ours.named_parameters()]
    pairs = zip(
        names,
        gradients(ours, x, hx, weights),
        gradients(theirs, x, hx, weights),
        strict=True,
    )
    for name, mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("kind", "options"), layer_cases())
def test_gradients_of_input_states_and_parameters_equal_torchs(kind, options, training):
    theirs, ours = pair(kind, **options)
    shape = (B, T, IN) if ours.batch_first else (T, B, IN)
    x = torch.randn(shape, dtype=torch.float64)
    theirs.train(training)
    ours.train(training)
    assert_same_gradients(theirs, ours, x, states(theirs, B))


@pytest.mark.parametrize("lengths", [(5, 3, 3, 1), (3, 1, 5)], ids=["sorted", "unsorted"])
@pytest.mark.parametrize(("kind", "options"), layer_cases())
def test_packed_gradients_equal_torchs(kind, options, lengths):
    theirs, ours = pair(kind, **options)
    rows = [torch.randn(n, IN, dtype=torch.float64) for n in lengths]
    x = pack_sequence(rows, enforce_sorted=lengths[0] == 5)
    assert_same_gradients(theirs, ours, x, states(theirs, len(lengths)))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("batch", [B, None], ids=["batched", "unbatched"])
def test_cell_gradients_equal_torchs(kind, batch):
    theirs, ours = pair(kind)
    x = torch.randn(*([] if batch is None else [batch]), IN, dtype=torch.float64)
    assert_same_gradients(theirs, ours, x, states(theirs, batch))


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_flow_when_only_some_tensors_need_them(kind):
    theirs, ours = pair(kind)
    for layer in (theirs, ours):
        layer.requires_grad_(False)
        layer.bias_hh_l0.requires_grad_()
    x = torch.randn(T, B, IN, dtype=torch.float64)
    found = [torch.autograd.grad(m(x)[0].sum(), m.bias_hh_l0)[0] for m in (theirs, ours)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-11)
    x.requires_grad_()
    found = [torch.autograd.grad(m(x)[0].sum(), x)[0] for m in (theirs, ours)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", LAYERS)
def test_backward_of_the_final_states_alone_equals_torchs(kind):
    theirs, ours = pair(kind, num_layers=2)
    x = torch.randn(T, B, IN, dtype=torch.float64)
    found = []
    for layer in (theirs, ours):
        total = sum(state.sum() for state in flat(layer(x)[1]))
        found.append(torch.autograd.grad(total, list(layer.parameters())))
    assert_same(found[1], found[0], tolerance=1e-11)


@pytest.mark.parametrize("kind", LAYERS)
def test_backward_in_eval_mode_of_a_forward_in_training_mode_works(kind):
    # cuDNN raises here (pytorch issues 5878 and 15788).
    _, layer = pair(kind)
    output, _ = layer.train()(torch.randn(T, B, IN, dtype=torch.float64))
    layer.eval()
    output.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("kind", LAYERS)
def test_backward_twice_over_a_retained_graph_gives_the_same(kind):
    _, layer = pair(kind)
    total = layer(torch.randn(T, B, IN, dtype=torch.float64))[0].sum()
    first = torch.autograd.grad(total, list(layer.parameters()), retain_graph=True)
    assert_same(torch.autograd.grad(total, list(layer.parameters())), first, tolerance=0)


@pytest.mark.parametrize("kind", LAYERS)
def test_many_gradients_at_once_equal_one_after_the_other(kind):
    _, ours = pair(kind, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)
    output = ours(x)[0]
    upstream = torch.randn(4, *output.shape, dtype=torch.float64)
    wanted = [x, *ours.parameters()]
    found = torch.autograd.grad(output, wanted, upstream, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(output, wanted, one, retain_graph=True) for one in upstream]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*each, strict=True))))


@pytest.mark.parametrize("kind", LAYERS)
def test_no_grad_and_inference_mode_build_no_graph_and_give_the_same_numbers(kind):
    _, layer = pair(kind, num_layers=2)
    x = torch.randn(T, B, IN, dtype=torch.float64)
    expected = layer(x)[0].detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output, _ = layer(x)
        assert not output.requires_grad
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradcheck_of_a_stacked_bidirectional_layer(kind):
    _, layer = pair(kind, 2, 3, num_layers=2, bidirectional=True)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], (x,))


@pytest.mark.parametrize("reset", ["after", "before"])
def test_gradgradcheck_of_a_gru(reset):
    _, layer = pair("GRU", 2, 3)
    layer.reset = reset
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    h = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, h: layer(x, h), (x, h))


def test_gradgradcheck_of_an_lstm():
    _, layer = pair("LSTM", 2, 3)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    h, c = (torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in "hc")
    assert torch.autograd.gradgradcheck(lambda x, h, c: flat(layer(x, (h, c))), (x, h, c))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_gradient_penalty_equals_torchs(kind, options):
    theirs, ours = pair(kind, **options)
    x = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)
    found = []
    for layer in (theirs, ours):
        (grad,) = torch.autograd.grad(layer(x)[0].pow(2).sum(), x, create_graph=True)
        penalty = grad.pow(2).sum()
        # The biases of the last layer may only act through the first derivative.
        found.append(torch.autograd.grad(penalty, [x, *layer.parameters()], allow_unused=True))
    assert_same(found[1], found[0], tolerance=1e-10)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradient_penalty_on_packed_input_equals_torchs(kind):
    theirs, ours = pair(kind)
    rows = [torch.randn(n, IN, dtype=torch.float64) for n in (2, 4, 3)]
    x = pack_sequence(rows, enforce_sorted=False)
    data = x.data.detach().requires_grad_()
    found = []
    for layer in (theirs, ours):
        output = layer(x._replace(data=data))[0].data
        (grad,) = torch.autograd.grad(output.pow(2).sum(), data, create_graph=True)
        found.append(torch.autograd.grad(grad.pow(2).sum(), [data, *layer.parameters()]))
    assert_same(found[1], found[0], tolerance=1e-10)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_functional_call_runs_with_the_given_weights(kind):
    _, ours = pair(kind)
    other, _ = pair(kind, seed=1)
    x = torch.randn(2, B, IN, dtype=torch.float64)
    x = x if kind in LAYERS else x[0]
    own = ours(x)
    given = torch.func.functional_call(ours, dict(other.named_parameters()), (x,))
    assert_same(given, other(x))
    assert_same(ours(x), own, tolerance=0)


@pytest.mark.parametrize("kind", LAYERS)
def test_func_grad_through_functional_call_equals_backward(kind):
    theirs, ours = pair(kind, num_layers=2)
    x = torch.randn(T, B, IN, dtype=torch.float64)

    def loss(weights):
        return torch.func.functional_call(ours, weights, (x,))[0].pow(2).sum()

    weights = {name: p.detach() for name, p in ours.named_parameters()}
    found = torch.func.grad(loss)(weights)
    theirs(x)[0].pow(2).sum().backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-11, atol=1e-11)


def _loss(layer, weights, x):
    return torch.func.functional_call(layer, weights, (x,))[0].pow(2).sum()


@pytest.mark.parametrize("kind", LAYERS)
def test_vmap_over_inputs_equals_a_loop_where_torch_has_no_rule(kind):
    _, layer = pair(kind, num_layers=2, bidirectional=True)
    xs = torch.randn(6, T, B, IN, dtype=torch.float64)
    together = torch.vmap(lambda x: layer(x)[0])(xs)
    torch.testing.assert_close(together, torch.stack([layer(x)[0] for x in xs]))


@pytest.mark.parametrize("kind", LAYERS)
def test_vmap_over_an_ensemble_of_weights_equals_a_loop(kind):
    layers = [pair(kind, seed=seed)[1] for seed in range(3)]
    x = torch.randn(T, B, IN, dtype=torch.float64)
    weights, _ = torch.func.stack_module_state(layers)
    together = torch.vmap(lambda w: torch.func.functional_call(layers[0], w, (x,))[0])(weights)
    torch.testing.assert_close(together, torch.stack([layer(x)[0] for layer in layers]))


@pytest.mark.parametrize("kind", LAYERS)
def test_per_sample_gradients_equal_a_loop_of_backward(kind):
    _, layer = pair(kind)
    xs = torch.randn(4, T, IN, dtype=torch.float64)
    weights = {name: p.detach() for name, p in layer.named_parameters()}
    grad = torch.func.grad(lambda w, x: _loss(layer, w, x))
    together = torch.vmap(grad, in_dims=(None, 0))(weights, xs)
    for index, x in enumerate(xs):
        layer.zero_grad()
        layer(x)[0].pow(2).sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(together[name][index], parameter.grad)


@pytest.mark.parametrize("kind", LAYERS)
def test_forward_and_reverse_mode_jacobians_agree_and_jvp_is_their_product(kind):
    _, layer = pair(kind)
    x, tangent = torch.randn(2, 3, 2, IN, dtype=torch.float64)

    def call(x):
        return layer(x)[0]

    reverse = torch.func.jacrev(call)(x)
    torch.testing.assert_close(torch.func.jacfwd(call)(x), reverse)
    _, product = torch.func.jvp(call, (x,), (tangent,))
    torch.testing.assert_close(product, torch.tensordot(reverse, tangent, dims=3))


@pytest.mark.parametrize("kind", LAYERS)
def test_checkpointing_gives_the_same_gradients(kind):
    _, layer = pair(kind, num_layers=2)
    x = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(layer(x)[0].sum(), [x, *layer.parameters()])
    output, _ = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    found = torch.autograd.grad(output.sum(), [x, *layer.parameters()])
    assert_same(found, expected, tolerance=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("kind", LAYERS)
def test_sixteen_bit_modules_give_sixteen_bit_gradients_near_the_float64_ones(kind, dtype):
    exact, ours = pair(kind)
    x = torch.randn(T, B, IN, dtype=torch.float64)
    ours = ours.to(dtype)
    exact(x)[0].sum().backward()
    ours(x.to(dtype))[0].sum().backward()
    for parameter, wide in zip(ours.parameters(), exact.parameters(), strict=True):
        assert parameter.grad.dtype == dtype
        torch.testing.assert_close(parameter.grad.double(), wide.grad, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", CELLS)
def test_gradients_through_a_loop_of_cells_equal_the_layers(kind):
    _, layer = pair(kind.removesuffix("Cell"))
    cell = getattr(rnnlm_kernels, kind)(IN, H, dtype=torch.float64)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = torch.randn(T, B, IN, dtype=torch.float64)
    hx, outputs = None, []
    for step in x:
        hx = cell(step, hx)
        outputs.append(hx if kind == "GRUCell" else hx[0])
    expected = torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))
    found = torch.autograd.grad(torch.stack(outputs).sum(), list(cell.parameters()))
    assert_same(found, expected, tolerance=1e-11)
