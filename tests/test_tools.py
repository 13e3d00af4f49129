# SPDX-License-Identifier: Apache-2.0
"""What tracers, transforms and quantising tools of PyTorch see of a layer is right, or said to be impossible in a line."""

import copy
import io
import sys
import warnings

import onnxruntime
import pytest
import torch
from torch import nn

import nearsight as ns
from nearsight.attention import native
from nearsight.compat.opacus import take_layers_whole
from nearsight.errors import BackendError, DtypeError
from nearsight.layers import SelfAttention
from nearsight.layers.projection import PatchProjection2d

NAT = {"depths": (1, 2), "num_heads": (1, 2), "embed_dim": 16, "kernel_size": 3, "num_classes": 3}
HALO = {"depths": (1, 1), "widths": (8, 16), "num_heads": 2, "block_size": 4, "halo_size": 1, "num_classes": 3}
NETWORKS = {
    "sasa_nano": lambda: ns.create_model("sasa_nano", depths=(1, 1), widths=(8, 16), num_classes=3),
    "sasa_micro": lambda: ns.create_model("sasa_micro", depths=(1, 1, 1), num_classes=3),
    "halo_h0": lambda: ns.create_model("halo_h0", **HALO),
    "dinat_mini": lambda: ns.create_model("dinat_mini", **NAT),
}
SIZES = {1: (7,), 2: (6, 7), 3: (3, 4, 3)}
LAYERS = {
    **{
        f"local, {rank} axes, {position}": (
            getattr(ns, f"LocalSelfAttention{rank}d"),
            rank,
            {"kernel_size": 3},
            position,
        )
        for rank, position in (
            (1, "relative"),
            (1, "cpb"),
            (2, "relative"),
            (2, "learned"),
            (2, "mixed_rope"),
            (3, "bias"),
        )
    },
    **{
        f"global, {rank} axes, {position}": (getattr(ns, f"GlobalSelfAttention{rank}d"), rank, {}, position)
        for rank, position in (
            (1, "bias"),
            (2, "relative"),
            (2, "cpb"),
            (2, "quadratic"),
            (2, "sinusoidal"),
            (3, "bias"),
        )
    },
    "strided": (
        ns.LocalSelfAttention2d,
        2,
        {"kernel_size": 3, "stride": 2, "dilation": (1, 2), "border": "zeros"},
        "bias",
    ),
    "torus": (ns.LocalSelfAttention2d, 2, {"kernel_size": 3, "border": "wrap"}, "mixed_rope"),
    "causal": (ns.LocalSelfAttention2d, 2, {"kernel_size": 3, "causal": True, "shared_by": 2}, "relative_shared"),
}


def layer_and_size(name):
    cls, rank, options, position = LAYERS[name]
    return cls(12, num_heads=2, position=position, map_size=11, **options).eval(), SIZES[rank]


def traced(model, example):
    """The program, made without a doubt of the tracer's, and of PyTorch's own operators."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        program = torch.jit.trace(model, example, check_trace=False)
    assert "nearsight::" not in str(program.inlined_graph)
    assert "PythonOp" not in str(program.inlined_graph)
    return program


@pytest.mark.parametrize("name", LAYERS)
def test_a_traced_layer_computes_the_same_on_other_sizes(name):
    layer, size = layer_and_size(name)
    program = traced(layer, torch.randn(1, 12, *size))
    for more in (0, 4, -1):
        x = torch.randn(2, 12, *[cells + more for cells in size])
        torch.testing.assert_close(program(x), layer(x))


@pytest.mark.parametrize(
    "made", [ns.HaloSelfAttention2d, ns.AttentionStem2d, lambda c, e, **_: PatchProjection2d(c, e, 2)]
)
def test_other_layers_are_traced(made):
    layer = made(8, 16, num_heads=2).eval()
    program = traced(layer, torch.randn(1, 8, 8, 8))
    for size in ((8, 8), (13, 7)):
        x = torch.randn(2, 8, *size)
        torch.testing.assert_close(program(x), layer(x))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.sweep] * (name in ("sasa_micro", "halo_h0"))) for name in NETWORKS]
)
def test_networks_are_traced_and_drawn(name):
    model = NETWORKS[name]().eval()
    program, graph = traced(model, torch.randn(1, 3, 32, 32)), torch.fx.symbolic_trace(model)
    for x in (torch.randn(1, 3, 32, 32), torch.randn(2, 3, 45, 40)):
        torch.testing.assert_close(program(x), model(x))
        torch.testing.assert_close(graph(x), model(x))
    assert {id(p) for p in graph.parameters()} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("name", ["local, 2 axes, relative", "global, 1 axes, bias"])
def test_a_layer_by_itself_is_a_graph(name):
    layer, size = layer_and_size(name)
    graph, x = torch.fx.symbolic_trace(layer), torch.randn(1, 12, *size)
    torch.testing.assert_close(graph(x), layer(x))
    assert {id(p) for p in graph.parameters()} == {id(p) for p in layer.parameters()}
    assert not any("_whole" in key for key in layer.state_dict())


def test_a_larger_map_than_the_tables_fails_in_a_trace_too():
    layer = ns.GlobalSelfAttention2d(8, num_heads=2, map_size=8)
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        torch.jit.trace(layer, torch.randn(1, 8, 6, 6))(torch.randn(1, 8, 9, 9))


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
def test_the_kernel_in_a_trace():
    """Named it is one node, for a window that does not grow with the map."""
    layer, x = ns.LocalSelfAttention2d(8, kernel_size=3, num_heads=2, backend="native"), torch.randn(2, 8, 9, 7)
    program = torch.jit.trace(layer, torch.randn(1, 8, 6, 6))
    assert str(program.inlined_graph).count("nearsight::attend") == 1
    torch.testing.assert_close(program(x), layer(x))
    with pytest.raises(BackendError, match="leaves the size of the map open"):
        torch.jit.trace(ns.GlobalSelfAttention2d(8, num_heads=2, backend="native"), torch.randn(1, 8, 6, 6))


# --------------------------------------------------------------------------------------------------- ONNX's old exporter


def exported(model, example):
    """The model as ``torch.onnx.export(dynamo=False)`` writes it, with every size open but that of the channels."""
    file = io.BytesIO()
    sizes = {axis: f"size {axis}" for axis in (0, *range(2, example.ndim))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is the old one, and that it folds no slices with steps
        torch.onnx.export(model, (example,), file, dynamo=False, input_names=["x"], dynamic_axes={"x": sizes})
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(file.getvalue(), options)
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def some(names, *now):
    """All of them in the long run, these always."""
    return [name if name in now else pytest.param(name, marks=pytest.mark.sweep) for name in names]


@pytest.mark.parametrize("name", some(LAYERS, "strided", "global, 2 axes, relative"))
def test_the_old_exporter_leaves_sizes_open(name):
    layer, size = layer_and_size(name)
    run = exported(layer, torch.randn(2, 12, *size))
    for batch, more in ((2, 0), (1, 4), (3, -1)):
        x = torch.randn(batch, 12, *[cells + more for cells in size])
        torch.testing.assert_close(run(x), layer(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", some(NETWORKS, "dinat_mini"))
def test_the_old_exporter_leaves_sizes_of_networks_open(name):
    model = NETWORKS[name]().eval()
    run = exported(model, torch.randn(1, 3, 32, 48))
    for shape in ((3, 3, 45, 70), (1, 3, 24, 40)):
        x = torch.randn(shape)
        torch.testing.assert_close(run(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("position", ["relative", "bias"])
def test_a_larger_map_than_the_tables_fails_in_an_old_export_too(position):
    run = exported(ns.GlobalSelfAttention2d(8, num_heads=2, map_size=8, position=position), torch.randn(1, 8, 6, 6))
    for size in ((6, 9), (20, 3)):
        with pytest.raises(Exception, match=r"(?i)out of range|indices element out of data bounds"):
            run(torch.randn(1, 8, *size))


# ---------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("name", ["local, 2 axes, relative", "global, 1 axes, bias"])
def test_derivatives_of_derivatives(name):
    layer, size = layer_and_size(name)
    x, v = torch.randn(2, 1, 12, *size)

    def loss(x):
        return layer(x).square().sum()

    layer.backend = "blocked"
    expected = torch.autograd.functional.hvp(loss, x, v)[1]
    layer.backend = None
    for found in (
        torch.func.jvp(torch.func.grad(loss), (x,), (v,))[1],
        torch.func.grad(lambda x: torch.func.jvp(loss, (x,), (v,))[1])(x),
        torch.func.grad(lambda x: (torch.func.grad(loss)(x) * v).sum())(x),
        torch.func.vmap(lambda v: torch.func.jvp(torch.func.grad(loss), (x,), (v,))[1])(v[None])[0],
    ):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


# ------------------------------------------------------------------------------------------- gradients of single pictures


def gradients_of_each(model, pictures, loss=lambda y: y.square().sum()):
    def of_one(parameters, picture):
        return loss(torch.func.functional_call(model, parameters, (picture[None],)))

    return torch.func.vmap(torch.func.grad(of_one), (None, 0))(dict(model.named_parameters()), pictures)


def by_hooks(model, pictures):
    """As Opacus 1.6 does where it has no rule of its own: modules that hold parameters, by what went in and came back."""
    found = {}

    def watch(module, path):
        copied = copy.deepcopy(module)  # without the hooks

        def back(module, _, grads):
            pairs = zip(inputs.pop(module), grads[0].detach(), strict=True)
            parts = [gradients_of_each(copied, x[None], lambda y, g=g: (y * g).sum()) for x, g in pairs]
            for name in parts[0]:
                found[f"{path}{name}"] = torch.cat([part[name] for part in parts])

        module.register_forward_hook(lambda module, x, _: inputs.__setitem__(module, x[0].detach()))
        module.register_full_backward_hook(back)

    def look(module, path=""):
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            watch(module, path)
            return
        for name, child in module.named_children():
            look(child, f"{path}{name}.")

    inputs = {}
    look(model)
    model(pictures).square().sum().backward()
    return found


@pytest.mark.parametrize("position", ["relative", "bias", "cpb", "learned", "mixed_rope"])
def test_tools_that_hook_what_holds_parameters_take_a_layer_whole(monkeypatch, position):
    """Three pictures, and three entries of a table: of "cpb" the one was taken for the other."""
    monkeypatch.setattr(SelfAttention, "parameters", SelfAttention.parameters)  # to be put back
    take_layers_whole()
    layer = ns.LocalSelfAttention2d(8, kernel_size=3, num_heads=2, position=position, map_size=5, recompute_qkv=True)
    model, pictures = nn.Sequential(nn.Conv2d(2, 8, 1), layer), torch.randn(3, 2, 5, 4)
    expected, found = gradients_of_each(model, pictures), by_hooks(model, pictures)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_opacus_is_waited_for():
    waiting = [finder for finder in sys.meta_path if getattr(finder, "name", None) == "opacus"]
    assert len(waiting) == 1 or "opacus" in sys.modules
    assert "parameters" not in vars(SelfAttention), "nobody else is told otherwise"


# ------------------------------------------------------------------------------------------------------------ quantising


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_quantised_networks_of_positions(dtype):
    layer, x = ns.LocalSelfAttention2d(8, kernel_size=3, num_heads=2, position="cpb").eval(), torch.randn(1, 8, 6, 5)
    found = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=dtype)
    assert not list(found.position.parameters())
    torch.testing.assert_close(found(x), layer(x), atol=0.1, rtol=0)


# --------------------------------------------------------------------------------------------------- several processes


@pytest.fixture
def mesh(tmp_path):
    """Of one process: what is asked of tensors is the same, whatever their number."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_fully_sharded_networks_have_the_same_gradients(mesh):
    torch.manual_seed(0)
    network = NETWORKS["sasa_nano"]()
    sharded, x = copy.deepcopy(network), torch.randn(2, 3, 16, 16)
    layers = [module for module in sharded.modules() if isinstance(module, SelfAttention)]
    assert layers
    for module in (*layers, sharded):
        torch.distributed.fsdp.fully_shard(module, mesh=mesh)
    found, expected = sharded(x), network(x)
    torch.testing.assert_close(found, expected)
    for output in (found, expected):
        output.square().sum().backward()
    for ours, theirs in zip(sharded.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)


def test_distributed_tensors_are_refused_in_a_line(mesh):
    shard = torch.distributed.tensor.Shard(0)
    plain, bias = torch.randn(2, 2, 5, 6, 4), torch.randn(2, 3, 3)
    maps, table = (torch.distributed.tensor.distribute_tensor(one, mesh, [shard]) for one in (plain, bias))
    for tensors, options in (((maps,) * 3, {}), ((plain, plain, maps), {}), ((plain,) * 3, {"bias": table})):
        with pytest.raises(DtypeError, match=r"received a distributed one: .* tensor\.to_local\(\)"):
            ns.local_attention(*tensors, ns.Window(3), **options)
    local = ns.local_attention(*(maps.to_local(),) * 3, ns.Window(3))
    torch.testing.assert_close(local, ns.local_attention(*(plain,) * 3, ns.Window(3)))
