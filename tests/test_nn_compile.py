"""torch.compile, torch.export, and torch.jit.trace keep a layer as operator calls."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from nn_pairs import CELLS, LAYERS, assert_same, flat, pair, states
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import rnnlm_kernels

# No size equals another: equal sizes would be compiled as one symbol.
B, IN, H = 5, 3, 7
OPTIONS = {
    "plain": {},
    "stacked": {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5},
}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operator_calls(graph, kind):
    """The calls of our forward operator in a graph."""
    operator = getattr(torch.ops.rnnlm_kernels, kind.removesuffix("Cell").lower()).default
    return [node for node in graph.nodes if node.target is operator]


def results_and_gradients(call, layer, x, hx):
    layer.zero_grad()
    result = call(x, hx)
    sum(out.pow(2).sum() for out in flat(result)).backward()
    return result, [p.grad.clone() for p in layer.parameters()]


@pytest.mark.parametrize("given_states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_compile_fullgraph_equals_eager_in_results_and_gradients(kind, options, given_states):
    _, layer = pair(kind, IN, H, **options)
    layer.eval()
    x = torch.randn(*((B, 4) if layer.batch_first else (4, B)), IN, dtype=torch.float64)
    hx = states(layer, B) if given_states else None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = results_and_gradients(layer, layer, x, hx)
    assert_same(results_and_gradients(compiled, layer, x, hx), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_compile_sees_one_operator_per_layer_and_direction(kind):
    layer = getattr(rnnlm_kernels, kind)(IN, H, num_layers=3, bidirectional=True)
    counter = CompileCounterWithBackend("eager")
    torch.compile(layer, fullgraph=True, backend=counter)(torch.randn(20, B, IN))
    (graph,) = counter.graphs
    assert len(operator_calls(graph.graph, kind)) == 6


@pytest.mark.parametrize("given_states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("kind", LAYERS)
def test_compile_dynamic_never_recompiles_for_another_length_or_batch(kind, given_states):
    _, layer = pair(kind, IN, H, num_layers=2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for steps, batch in ((11, 5), (4, 9), (23, 2), (2, 31)):
        x = torch.randn(steps, batch, IN, dtype=torch.float64)
        hx = states(layer, batch) if given_states else None
        assert_same(compiled(x, hx), layer(x, hx))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 4


@pytest.mark.parametrize("kind", LAYERS)
def test_compile_by_default_recompiles_once_and_then_takes_any_length(kind):
    _, layer = pair(kind, IN, H)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for steps, batch in ((11, 5), (4, 9), (23, 2), (6, 31), (30, 4)):
        x = torch.randn(steps, batch, IN, dtype=torch.float64)
        assert_same(compiled(x), layer(x))
    assert counter.frame_count == 2  # the first sizes, then any


def packed_input_fits_in_one_graph():
    """Whether this torch can make a PackedSequence in a graph; 2.6 cannot."""

    @torch.compile(fullgraph=True, backend="eager")
    def remake(x):
        return PackedSequence(x.data * 2, x.batch_sizes)

    try:
        remake(pack_sequence([torch.zeros(1, 1)]))
    except torch._dynamo.exc.Unsupported:
        return False
    return True


@pytest.mark.parametrize("lengths", [(5, 3, 2), (2, 5, 3)], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("given_states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("kind", LAYERS)
def test_compile_takes_packed_input(kind, given_states, lengths):
    _, layer = pair(kind, IN, H, bidirectional=True)
    rows = [torch.randn(n, IN, dtype=torch.float64) for n in lengths]
    x = pack_sequence(rows, enforce_sorted=lengths[0] == 5)
    hx = states(layer, 3) if given_states else None
    full = given_states or lengths[0] != 5  # else the batch size is read from a tensor
    full = full and packed_input_fits_in_one_graph()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=full, backend=counter)
    expected = results_and_gradients(layer, layer, x, hx)
    assert_same(results_and_gradients(compiled, layer, x, hx), expected)
    assert sum(len(operator_calls(graph.graph, kind)) for graph in counter.graphs) == 2


@pytest.mark.parametrize("kind", LAYERS)
def test_compile_takes_unbatched_input_and_autocast(kind):
    layer = getattr(rnnlm_kernels, kind)(IN, H)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, IN)
    assert_same(compiled(x), layer(x), tolerance=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = compiled(x)
        assert_same(result, layer(x), tolerance=0.02)
    assert result[0].dtype == torch.bfloat16


def test_compile_takes_return_cells_and_reset_before():
    lstm = rnnlm_kernels.LSTM(IN, H, bidirectional=True, return_cells=True)
    gru = rnnlm_kernels.GRU(IN, H, reset="before")
    for layer in (lstm, gru):
        x = torch.randn(4, B, IN)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_same(compiled(x), layer(x), tolerance=1e-5)


@pytest.mark.parametrize("kind", CELLS)
def test_compile_takes_a_loop_of_cells(kind):
    _, cell = pair(kind, IN, H)

    def run(x):
        hx = None
        for step in x:
            hx = cell(step, hx)
        return hx

    x = torch.randn(3, B, IN, dtype=torch.float64)
    assert_same(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_compile_sees_changed_weights(kind):
    _, layer = pair(kind, IN, H)
    x = torch.randn(4, B, IN, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    assert_same(compiled(x), layer(x))
    layer.weight_ih_l0 = torch.nn.Parameter(torch.randn_like(layer.weight_ih_l0))
    assert_same(compiled(x), layer(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_compile_takes_a_parametrized_layer(kind):
    _, layer = pair(kind, IN, H)
    torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    x = torch.randn(4, B, IN, dtype=torch.float64)
    assert_same(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_compile_keeps_layers_around_the_recurrence_in_one_graph():
    # With torch.nn.LSTM nothing of such a model is compiled (pytorch issue 141184).
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(IN, IN)
            self.rnn = torch.nn.LSTM(IN, H)
            self.outer = torch.nn.Linear(H, 2)

        def forward(self, x):
            return self.outer(self.rnn(self.inner(x))[0])

    model = Model()
    rnnlm_kernels.replace(model)
    counter = CompileCounterWithBackend("aot_eager")
    x = torch.randn(4, B, IN)
    result = torch.compile(model, fullgraph=True, backend=counter)(x)
    torch.testing.assert_close(result, model(x))
    assert counter.frame_count == 1
    assert len(operator_calls(counter.graphs[0].graph, "LSTM")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
def test_inductor_trains_where_torchs_lstm_crashes(kind):
    _, layer = pair(kind, IN, H, num_layers=2)
    x = torch.randn(4, B, IN, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True)
    try:
        found = results_and_gradients(compiled, layer, x, None)
    except torch._inductor.exc.InductorError as error:
        if "InvalidCxxCompiler" in str(error):
            pytest.skip("no C++ compiler for inductor")
        raise
    assert_same(found, results_and_gradients(layer, layer, x, None))


# --- export -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_export_with_dynamic_length_and_batch_runs_any_size_after_reloading(kind, options):
    _, layer = pair(kind, IN, H, **options)
    layer.eval()
    time, batch = torch.export.Dim("time"), torch.export.Dim("batch")
    first = layer.batch_first
    x = torch.randn(*((B, 4) if first else (4, B)), IN, dtype=torch.float64)
    dims = {0: batch, 1: time} if first else {0: time, 1: batch}
    with warnings.catch_warnings():
        # torch's layers are warned about: they assign attributes while they are exported.
        warnings.filterwarnings("error", message=".*were assigned during export.*")
        program = torch.export.export(layer, (x,), dynamic_shapes=(dims,))
    calls = operator_calls(program.graph, kind)
    assert len(calls) == layer.num_layers * (1 + layer.bidirectional)

    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for shape in ((2, 9), (11, 2), (6, 13)):
        x = torch.randn(*shape, IN, dtype=torch.float64)
        assert_same(loaded(x), layer(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_export_takes_initial_states_with_a_dynamic_batch(kind):
    _, layer = pair(kind, IN, H)
    time, batch = torch.export.Dim("time"), torch.export.Dim("batch")
    x, hx = torch.randn(4, B, IN, dtype=torch.float64), states(layer, B)
    state_dims = {1: batch} if kind == "GRU" else ({1: batch}, {1: batch})
    program = torch.export.export(layer, (x, hx), dynamic_shapes=({0: time, 1: batch}, state_dims))
    x, hx = torch.randn(9, 2, IN, dtype=torch.float64), states(layer, 2)
    assert_same(program.module()(x, hx), layer(x, hx))


@pytest.mark.parametrize("kind", LAYERS)
def test_export_decompositions_do_not_unroll_time(kind):
    layer = getattr(rnnlm_kernels, kind)(IN, H)
    program = torch.export.export(layer, (torch.randn(12, B, IN),)).run_decompositions()
    assert len(operator_calls(program.graph, kind)) == 1


@pytest.mark.parametrize("kind", CELLS)
def test_export_takes_a_cell(kind):
    cell = getattr(rnnlm_kernels, kind)(IN, H)
    x = torch.randn(B, IN)
    program = torch.export.export(cell, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = torch.randn(2, IN)
    assert_same(program.module()(x), cell(x), tolerance=1e-6)


# --- jit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace_runs_can_be_saved_and_takes_other_sizes(kind, options):
    _, layer = pair(kind, IN, H, **options)
    layer.eval()
    x = torch.randn(4, 4, IN, dtype=torch.float64)
    # Without it the tracer's own check, which runs under no_grad, sees another operator argument.
    with torch.no_grad():
        traced = torch.jit.trace(layer, (x,))
    assert_same(traced(x), layer(x))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    x = torch.randn(6, 2, IN, dtype=torch.float64)
    assert_same(torch.jit.load(buffer)(x), layer(x))


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script_is_refused_with_the_way_out_and_leaves_the_model_alone(kind):
    layer = getattr(rnnlm_kernels, kind)(IN, H)
    model = torch.nn.Sequential(layer)
    with pytest.raises(RuntimeError, match=r"cannot compile rnnlm_kernels.*torch.export"):
        torch.jit.script(model)
    assert model[0] is layer


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script_takes_a_restored_model(kind):
    model = torch.nn.Sequential(getattr(torch.nn, kind)(IN, H))
    rnnlm_kernels.replace(model)
    rnnlm_kernels.restore(model)
    torch.jit.script(model)
