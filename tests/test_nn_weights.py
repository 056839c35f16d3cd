"""Every way to exchange, share, convert, save, or hook a module's weights works as in torch."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from nn_pairs import CELLS, LAYERS, assert_same, flat, layer_cases, pair, states
from torch.nn.utils import parametrizations, parametrize, prune

import rnnlm_kernels

T, B, IN, H = 4, 3, 3, 5
ALL = (*LAYERS, *CELLS)


def inputs(kind, dtype=torch.float64):
    torch.manual_seed(3)
    return torch.randn(*((T, B) if kind in LAYERS else (B,)), IN, dtype=dtype)


def hidden_name(kind):
    return "weight_hh_l0" if kind in LAYERS else "weight_hh"


@pytest.mark.parametrize("kind", ALL)
def test_assigned_parameter_is_used_and_listed(kind):
    theirs, ours = pair(kind)
    weight = torch.nn.Parameter(torch.randn_like(getattr(ours, hidden_name(kind))))
    for module in (theirs, ours):
        setattr(module, hidden_name(kind), weight)
    assert_same(ours(inputs(kind)), theirs(inputs(kind)))
    if kind in LAYERS:
        assert ours._flat_weights[1] is weight


@pytest.mark.parametrize("kind", ALL)
def test_weight_drop_pattern_works_and_its_gradient_reaches_the_raw_weight(kind):
    theirs, module = pair(kind)
    name = hidden_name(kind)
    raw = getattr(module, name)
    delattr(module, name)
    x, hx = inputs(kind), states(module, B)
    for keep in (0.0, 0.5):
        setattr(module, name, raw * keep)
        with torch.no_grad():
            getattr(theirs, name).copy_(raw * keep)
        assert_same(module(x, hx), theirs(x, hx))
    flat(module(x, hx))[0].sum().backward()
    assert raw.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ALL)
def test_deleted_weight_raises_its_name(kind):
    _, module = pair(kind)
    delattr(module, hidden_name(kind))
    with pytest.raises(AttributeError, match=hidden_name(kind)):
        module(inputs(kind))


@pytest.mark.parametrize("make", ["weight_norm", "spectral_norm", "orthogonal"])
@pytest.mark.parametrize("kind", ALL)
def test_parametrizations_equal_torchs_and_can_be_removed(kind, make):
    theirs, ours = pair(kind)
    for module in (theirs, ours):
        torch.manual_seed(5)
        getattr(parametrizations, make)(module, hidden_name(kind))
    ours.load_state_dict(theirs.state_dict())
    x = inputs(kind)
    for module in (theirs, ours):
        module.eval()  # spectral_norm iterates in training
    assert_same(ours(x), theirs(x))
    flat(ours(x))[0].sum().backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)
    for module in (theirs, ours):
        parametrize.remove_parametrizations(module, hidden_name(kind))
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_own_parametrization_is_recomputed_on_every_call(kind):
    class Scale(torch.nn.Module):
        factor = 1.0

        def forward(self, weight):
            return weight * self.factor

    _, layer = pair(kind)
    scale = Scale()
    parametrize.register_parametrization(layer, "weight_hh_l0", scale)
    x = inputs(kind)
    first = layer(x)[0]
    scale.factor = 0.0
    assert not torch.equal(layer(x)[0], first)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_hook_based_weight_norm_equals_torchs(kind):
    theirs, ours = pair(kind)
    for module in (theirs, ours):
        torch.nn.utils.weight_norm(module, "weight_hh_l0")
        module.weight_hh_l0_g.data.mul_(2)
    assert_same(ours(inputs(kind)), theirs(inputs(kind)))


@pytest.mark.parametrize("kind", LAYERS)
def test_pruning_equals_torchs(kind):
    theirs, ours = pair(kind)
    for module in (theirs, ours):
        prune.l1_unstructured(module, "weight_hh_l0", amount=0.5)
    assert_same(ours(inputs(kind)), theirs(inputs(kind)))


@pytest.mark.parametrize("kind", ALL)
def test_load_state_dict_with_assign_uses_the_given_tensors(kind):
    _, ours = pair(kind)
    other, _ = pair(kind, seed=1)
    ours.load_state_dict(other.state_dict(), assign=True)
    name = hidden_name(kind)
    assert getattr(ours, name).data_ptr() == getattr(other, name).data_ptr()
    assert_same(ours(inputs(kind)), other(inputs(kind)))


@pytest.mark.parametrize("kind", LAYERS)
def test_tied_weights_of_two_layers_stay_tied(kind):
    layer = getattr(rnnlm_kernels, kind)(H, H, 2)
    layer.weight_hh_l1 = layer.weight_hh_l0
    layer(torch.randn(T, B, H))[0].sum().backward()
    assert layer.weight_hh_l1.grad is layer.weight_hh_l0.grad


@pytest.mark.parametrize("kind", LAYERS)
def test_replaced_weights_are_freed(kind):
    layer = getattr(rnnlm_kernels, kind)(IN, H)
    old = weakref.ref(layer.weight_hh_l0)
    layer.weight_hh_l0 = torch.nn.Parameter(torch.zeros_like(layer.weight_hh_l0))
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("kind", ALL)
def test_optimizer_step_is_seen_by_the_next_call(kind):
    theirs, ours = pair(kind)
    x = inputs(kind)
    for module in (theirs, ours):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        flat(module(x))[0].pow(2).sum().backward()
        optimizer.step()
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_flatten_and_unflatten_parameters_for_data_parallel_schemes(kind):
    _, layer = pair(kind)
    x = inputs(kind)
    vector = torch.nn.utils.parameters_to_vector(layer.parameters())
    expected = layer(x)
    torch.nn.utils.vector_to_parameters(vector.clone(), layer.parameters())
    assert_same(layer(x), expected, tolerance=0)


# --- copies and files ---------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), layer_cases())
def test_pickle_and_deepcopy_give_an_equal_independent_layer(kind, options):
    _, layer = pair(kind, **options)
    shape = (B, T, IN) if layer.batch_first else (T, B, IN)
    x = torch.randn(shape, dtype=torch.float64)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer)
        assert_same(twin(x), expected, tolerance=0)
        torch.nn.init.zeros_(twin.weight_hh_l0)
        assert_same(layer(x), expected, tolerance=0)
        assert twin._flat_weights[1] is twin.weight_hh_l0


def test_pickle_keeps_own_options():
    layer = rnnlm_kernels.LSTM(IN, H, backend="reference", return_cells=True)
    twin = pickle.loads(pickle.dumps(layer))
    assert (twin.backend, twin.return_cells) == ("reference", True)
    assert pickle.loads(pickle.dumps(rnnlm_kernels.GRU(IN, H, reset="before"))).reset == "before"
    assert copy.deepcopy(rnnlm_kernels.GRUCell(IN, H, reset="before")).reset == "before"


@pytest.mark.parametrize("kind", CELLS)
def test_pickle_and_deepcopy_give_an_equal_cell(kind):
    _, cell = pair(kind)
    x = inputs(kind)
    for twin in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert_same(twin(x), cell(x), tolerance=0)


@pytest.mark.parametrize("kind", ALL)
def test_torch_save_of_the_module_and_of_its_state_dict(kind):
    _, module = pair(kind)
    x = inputs(kind)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=False)(x), module(x), tolerance=0)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    weights = torch.load(buffer, weights_only=True)
    theirs, _ = pair(kind, seed=9)
    theirs.load_state_dict(weights)
    assert_same(module(x), theirs(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_pickle_after_functional_call_holds_the_own_weights(kind):
    _, layer = pair(kind)
    other = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    torch.func.functional_call(layer, other, (inputs(kind),))
    assert_same(pickle.loads(pickle.dumps(layer))(inputs(kind)), layer(inputs(kind)), tolerance=0)


# --- devices, dtypes, processes -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_to_empty_from_meta_then_load_works(kind):
    theirs, _ = pair(kind)
    module = getattr(rnnlm_kernels, kind)(IN, H, device="meta", dtype=torch.float64)
    module.to_empty(device="cpu")
    module.load_state_dict(theirs.state_dict())
    assert_same(module(inputs(kind)), theirs(inputs(kind)))


@pytest.mark.parametrize("kind", LAYERS)
def test_load_state_dict_with_assign_into_a_meta_layer_works(kind):
    theirs, _ = pair(kind)
    with torch.device("meta"):
        layer = getattr(rnnlm_kernels, kind)(IN, H, dtype=torch.float64)
    layer.load_state_dict(theirs.state_dict(), assign=True)
    assert_same(layer(inputs(kind)), theirs(inputs(kind)))


@pytest.mark.parametrize("kind", ALL)
def test_to_converts_in_place_and_back(kind):
    theirs, ours = pair(kind)
    assert ours.to(torch.float32).to(torch.float64) is ours
    theirs.float().double()
    assert_same(ours(inputs(kind)), theirs(inputs(kind)))


@pytest.mark.parametrize("kind", ALL)
def test_share_memory_shares_every_weight(kind):
    _, module = pair(kind)
    module.share_memory()
    assert all(p.is_shared() for p in module.parameters())
    flat(module(inputs(kind)))


@pytest.mark.parametrize("kind", LAYERS)
def test_replica_for_data_parallel_has_its_own_weight_list(kind):
    theirs, ours = pair(kind, num_layers=2)
    results = []
    for layer in (theirs, ours):
        replica = layer._replicate_for_data_parallel()
        assert replica._flat_weights is not layer._flat_weights
        assert replica._flat_weights_names is not layer._flat_weights_names
        # What torch.nn.parallel.replicate does next: plain tensors as attributes.
        for name, parameter in layer.named_parameters():
            setattr(replica, name, parameter.detach() * 2)
        results.append(replica(inputs(kind)))
    assert_same(results[1], results[0])


@pytest.fixture
def process_group(tmp_path):
    """A process group of this process alone."""
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="fully_shard cannot run on the CPU in torch 2.6",
)
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind", LAYERS)
def test_fully_sharded_layer_gives_the_same_results_and_gradients(kind):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    _, layer = pair(kind, num_layers=2)
    plain = copy.deepcopy(layer)
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    assert_same(layer(inputs(kind)), plain(inputs(kind)), tolerance=0)
    for module in (layer, plain):
        module(inputs(kind))[0].sum().backward()
    for sharded, parameter in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(sharded.grad.full_tensor(), parameter.grad)


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_with_one_flat_parameter_gives_the_same_results_and_gradients(kind):
    from torch.distributed.fsdp import FullyShardedDataParallel

    _, layer = pair(kind, num_layers=2)
    plain = copy.deepcopy(layer)
    # Every forward puts views of the flat parameter in the place of the layer's own.
    flattened = FullyShardedDataParallel(layer, use_orig_params=True, device_id=torch.device("cpu"))
    assert_same(flattened(inputs(kind)), plain(inputs(kind)), tolerance=0)
    for module in (flattened, plain):
        module(inputs(kind))[0].sum().backward()
    for view, parameter in zip(flattened.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(view.grad, parameter.grad)


@pytest.mark.parametrize("kind", LAYERS)
def test_torchs_weight_bookkeeping_can_still_be_called(kind):
    _, layer = pair(kind)
    weights = [id(w) for w in layer._flat_weights]
    layer._update_flat_weights()
    layer._init_flat_weights()
    assert layer._weights_have_changed() is False
    assert [id(w) for w in layer._flat_weights] == weights


# --- hooks and subclasses -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_forward_hooks_see_input_and_output_and_may_change_them(kind):
    _, module = pair(kind)
    seen = []
    before = module.register_forward_pre_hook(lambda m, args: seen.append(args))
    after = module.register_forward_hook(lambda m, args, out: ("changed", out))
    x = inputs(kind)
    result = module(x)
    assert seen[0][0] is x
    assert result[0] == "changed"
    before.remove()
    after.remove()
    assert_same(module(x), result[1], tolerance=0)
    assert len(seen) == 1


@pytest.mark.parametrize("kind", ALL)
def test_parameter_hooks_see_the_gradient(kind):
    _, module = pair(kind)
    seen = []
    getattr(module, hidden_name(kind)).register_hook(seen.append)
    flat(module(inputs(kind)))[0].sum().backward()
    assert torch.equal(seen[0], getattr(module, hidden_name(kind)).grad)


@pytest.mark.parametrize("kind", ALL)
def test_full_backward_hooks_run(kind):
    _, module = pair(kind)
    seen = []
    module.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(grad_in[0]))
    x = inputs(kind).requires_grad_()
    flat(module(x))[0].sum().backward()
    torch.testing.assert_close(seen[0], x.grad)


@pytest.mark.parametrize("kind", ALL)
def test_subclass_with_own_forward_works(kind):
    cls = getattr(rnnlm_kernels, kind)

    class Doubled(cls):
        def forward(self, input, hx=None):
            return flat(super().forward(input, hx))[0] * 2

    module = Doubled(IN, H, dtype=torch.float64)
    x = inputs(kind)
    torch.testing.assert_close(module(x), flat(cls.forward(module, x))[0] * 2)
    assert repr(module) == "Doubled(3, 5)"
