"""The table from logical axes to mesh axes, and the layouts that follow from it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from switchjax.config import MeshConfig
from switchjax.parallel.mesh import AXES, make_mesh
from switchjax.parallel.sharding import (
    AXIS_RULES,
    constrain,
    mark_sharded,
    named_leaves,
    optimizer_shardings,
    parameter_shardings,
    parameter_specs,
    partition_spec,
    place_batch,
    process_rows,
    sharded_spec,
    unshard,
    with_leaves,
)


class Parameters(nnx.Module):
    """The kinds of parameters of models, in sizes that Adafactor factors (128 and more) and does not factor."""

    def __init__(self) -> None:
        self.norm = nnx.Param(jnp.ones(256), axes=("embed",))
        self.w_in = nnx.Param(jnp.ones((256, 512)), axes=("embed", "mlp"))
        self.out = nnx.Param(jnp.ones((4, 64, 256)), axes=("heads", "head", "embed"))
        self.square = nnx.Param(jnp.ones((256, 256)), axes=("embed", "mlp"))
        self.experts = nnx.Param(jnp.ones((2, 8, 512, 256)), axes=("layer", "expert", "mlp", "embed"))
        self.bias = nnx.Param(jnp.ones((4, 32)), axes=("heads", "bucket"))


SPECS = {
    "norm": P(None),
    "w_in": P(None, "model"),
    "out": P("model", None, None),
    "square": P(None, "model"),
    "experts": P(None, "expert", "model", None),
    "bias": P("model", None),
}


@pytest.fixture(scope="module")
def shapes() -> Parameters:
    return jax.eval_shape(Parameters)


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(2, 2, 2))


def test_the_table_names_mesh_axes_only() -> None:
    for rule in AXIS_RULES.values():
        assert set(rule if isinstance(rule, tuple) else (rule,)) <= {*AXES, None}


def test_specs_follow_the_axes_of_each_parameter(shapes: Parameters, mesh: jax.sharding.Mesh) -> None:
    specs, shardings = parameter_specs(shapes), parameter_shardings(shapes, mesh)
    for name, spec in SPECS.items():
        assert getattr(specs, name) == spec
        assert getattr(shardings, name) == NamedSharding(mesh, spec)


def test_a_sliced_parameter_keeps_the_layout_of_what_is_left(shapes: Parameters) -> None:
    """Inside a scan over layers, the first dimension is gone but its name remains."""
    sliced = jax.eval_shape(lambda model: jax.tree.map(lambda values: values[0], model), shapes)
    assert parameter_specs(sliced).experts == P("expert", "model", None)


def test_an_unknown_axis_is_an_error() -> None:
    with pytest.raises(KeyError, match="mpl"):
        partition_spec("embed", "mpl")


# `embed` goes over those batch axes that the parameter does not use yet; vectors and others without it stay.
SHARDED_SPECS = {
    "norm": P(None),
    "w_in": P(("data", "expert"), "model"),
    "out": P("model", None, ("data", "expert")),
    "square": P(("data", "expert"), "model"),
    "experts": P(None, "expert", "model", ("data",)),
    "bias": P("model", None),
}


def test_sharded_parameters_lie_in_parts_and_are_used_whole(mesh: jax.sharding.Mesh) -> None:
    marked = jax.eval_shape(lambda: mark_sharded(Parameters(), "parameters"))
    for name, spec in SHARDED_SPECS.items():
        assert getattr(parameter_shardings(marked, mesh), name) == NamedSharding(mesh, spec)
        assert getattr(parameter_specs(marked), name) == SPECS[name]
    alone = jax.eval_shape(lambda: mark_sharded(Parameters(), "optimizer"))
    assert parameter_shardings(alone, mesh).w_in == NamedSharding(mesh, SPECS["w_in"])


def test_a_layer_of_a_stack_is_sharded_as_all_of_them_are() -> None:
    assert sharded_spec("layer", "embed", "mlp") == P(None, *sharded_spec("embed", "mlp"))
    assert sharded_spec("layer", "embed") == P(None, None)


def test_unshard_brings_all_but_stacks_of_layers_together(mesh: jax.sharding.Mesh) -> None:
    model = mark_sharded(Parameters(), "parameters")
    assert unshard(model) is model  # without a mesh
    placed = jax.device_put(model, parameter_shardings(model, mesh))
    assert {shard.data.shape for shard in placed.w_in[...].addressable_shards} == {(64, 256)}
    with jax.set_mesh(mesh):
        used = jax.jit(unshard)(placed)
    assert used.w_in[...].sharding.is_equivalent_to(NamedSharding(mesh, SPECS["w_in"]), 2)
    assert used.experts[...].sharding.is_equivalent_to(NamedSharding(mesh, SHARDED_SPECS["experts"]), 4)
    np.testing.assert_array_equal(used.w_in[...], model.w_in[...])


def test_constrain_lays_an_array_over_the_mesh_and_leaves_it_alone_without_one(mesh: jax.sharding.Mesh) -> None:
    x = np.arange(32.0, dtype=np.float32).reshape(8, 4)
    constrained = jax.jit(lambda x: constrain(x * 2, "batch", "embed"))
    assert constrained(x).sharding.is_fully_replicated
    with jax.set_mesh(mesh):
        y = constrained(x)
    assert y.sharding.spec == P(("data", "expert"), None) or y.sharding.spec == P(("data", "expert"))
    np.testing.assert_array_equal(y, 2 * x)


def test_leaves_have_plain_names_and_come_back_under_them(shapes: Parameters) -> None:
    nested = {"decoder": nnx.List([shapes, shapes])}
    named = named_leaves(nested)
    assert {name.removeprefix("decoder/1/") for name in named if "/1/" in name} == set(SPECS)
    assert len(named) == 2 * len(SPECS)
    values = {name: np.full(leaf.shape[:1], i) for i, (name, leaf) in enumerate(named.items())}
    assert named_leaves(with_leaves(nested, dict(reversed(values.items())))) == values


def layouts(optimizer: optax.GradientTransformation, shapes: Parameters, mesh: jax.sharding.Mesh) -> list[tuple]:
    """The path, shape and spec of every array of the optimiser's state."""
    state = jax.eval_shape(optimizer.init, named_leaves(shapes))
    shardings = optimizer_shardings(state, shapes, mesh)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    specs = [sharding.spec for sharding in jax.tree.leaves(shardings)]
    return [(jax.tree_util.keystr(path), leaf.shape, spec) for (path, leaf), spec in zip(leaves, specs, strict=True)]


def entries(spec: P, rank: int) -> tuple:
    return tuple(spec) + (None,) * (rank - len(spec))


def test_adamw_moments_lie_where_their_parameters_do(shapes: Parameters, mesh: jax.sharding.Mesh) -> None:
    found = 0
    for path, shape, spec in layouts(optax.adamw(1e-3), shapes, mesh):
        owner = next((name for name in SPECS if f"'{name}'" in path), None)
        assert entries(spec, len(shape)) == entries(SPECS[owner] if owner else P(), len(shape)), path
        found += owner is not None
    assert found == 2 * len(SPECS)


def test_adafactor_statistics_lose_the_axis_that_was_averaged_away(shapes: Parameters, mesh: jax.sharding.Mesh) -> None:
    expected = {
        ("v_row", "w_in"): ((256,), (None,)),
        ("v_col", "w_in"): ((512,), ("model",)),
        ("v_row", "experts"): ((2, 8, 256), (None, "expert", None)),
        ("v_col", "experts"): ((2, 8, 512), (None, "expert", "model")),
        # With two equal dimensions, v_row is a mean over the last and v_col over the other.
        ("v_row", "square"): ((256,), (None,)),
        ("v_col", "square"): ((256,), ("model",)),
        # Not factored, so `v` has the whole shape.
        ("v", "norm"): ((256,), (None,)),
        ("v", "bias"): ((4, 32), ("model", None)),
        ("v", "out"): ((4, 64, 256), ("model", None, None)),
    }
    seen = {}
    for path, shape, spec in layouts(optax.adafactor(1e-3), shapes, mesh):
        for kind, name in expected:
            if f".{kind}[" in path and f"'{name}'" in path:
                seen[kind, name] = (shape, entries(spec, len(shape)))
    assert seen == expected


@pytest.mark.parametrize("sharded", ["parameters", "optimizer"])
def test_the_state_of_sharded_parameters_lies_in_parts_too(sharded: str, mesh: jax.sharding.Mesh) -> None:
    marked = jax.eval_shape(lambda: mark_sharded(Parameters(), sharded))
    moments = {
        next(name for name in SPECS if f"'{name}'" in path): spec
        for path, _, spec in layouts(optax.adamw(1e-3), marked, mesh)
        if ".mu" in path
    }
    assert moments == SHARDED_SPECS
    factored = {path: entries(spec, len(shape)) for path, shape, spec in layouts(optax.adafactor(1e-3), marked, mesh)}
    rows, columns = (
        next(spec for path, spec in factored.items() if f".{kind}[" in path and "'w_in'" in path)
        for kind in ("v_row", "v_col")
    )
    assert rows == (("data", "expert"),)  # the mean over `mlp`
    assert columns == ("model",)  # the mean over `embed`


def test_everything_else_of_an_optimizer_is_on_every_device(shapes: Parameters, mesh: jax.sharding.Mesh) -> None:
    for path, shape, spec in layouts(optax.adafactor(1e-3), shapes, mesh):
        if shape in ((), (1,)):  # step counts, and the placeholders of statistics that are not kept
            assert entries(spec, len(shape)) == (None,) * len(shape), path


def test_a_batch_lies_over_data_and_expert_in_the_order_of_its_rows() -> None:
    mesh, rows = make_mesh(MeshConfig(2, 2, 2)), np.arange(24).reshape(12, 2)
    assert process_rows(mesh, 12) == list(range(12))
    placed = place_batch({"rows": rows}, mesh)["rows"]
    np.testing.assert_array_equal(placed, rows)
    assert [shard.data[0, 0] for shard in placed.addressable_shards] == [0, 0, 6, 6, 12, 12, 18, 18]
