"""The HLO parser on hand-written programs, and on the compiler's programs for the emulated mesh."""

from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from switchjax.accounting.hardware import parse_slice
from switchjax.config import Config, MeshConfig
from switchjax.moe.ragged import grouped_product
from switchjax.parallel.mesh import EXPERT, make_mesh
from switchjax.planning import hlo
from switchjax.planning.hlo_collectives import Traffic, axes_between, collectives, replica_group, traffic
from switchjax.planning.hlo_cost import matmul_flops
from switchjax.planning.hlo_memory import memory_traffic, saved_activations
from switchjax.planning.topology import describe_devices
from switchjax.studies.compile_benchmark import compiled_programs_in
from switchjax.training.state import plan_state
from switchjax.training.step import lower_train_step
from tests.tiny import changed

# A loop of 5 turns without the compiler's own count, as TPUs have them, with one of 3 turns inside.
LOOPS = Path(__file__).with_name("loops.hlo").read_text()


def test_loop_bodies_count_as_often_as_their_loops_turn() -> None:
    program = hlo.parse(LOOPS)
    assert program.entry == "main"
    executions = program.executions
    assert executions["outer_body"] == 5
    assert executions["outer_condition"] == 6
    assert executions["inner_body"] == 15


def test_collectives_have_their_bytes_times_and_groups_and_a_pair_counts_once() -> None:
    found = {one.kind: one for one in collectives(hlo.parse(LOOPS))}
    assert set(found) == {"all-to-all", "all-gather", "all-reduce"}
    assert found["all-to-all"][:4] == ("all-to-all", 8 * 16 * 2, 15, (0, 1, 2, 3))
    assert found["all-gather"][:4] == ("all-gather", 32 * 16 * 2, 5, (0, 2, 4, 6))
    assert found["all-reduce"][:4] == ("all-reduce", 4 * 2 * 4, 1, (0, 1))
    totals = traffic(list(found.values()))
    assert totals["all-to-all"] == Traffic(15, 15 * 256)
    assert totals["all-gather"] == Traffic(5, 5 * 1024)


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", (0, 2)),
        ("replica_groups=[2,4]<=[8], dimensions={0}", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, use_global_device_ids=true", (0, 2)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={1}", (0, 1, 2, 3)),
        ("source_target_pairs={{0,3},{3,0}}", (0, 3)),
        ("replica_groups={}, to_apply=%add", ()),
    ],
)
def test_groups_are_read_in_every_form(attributes: str, group: tuple[int, ...]) -> None:
    assert replica_group(attributes) == group


@pytest.mark.parametrize(
    ("group", "axes"),
    [
        ((0, 1), ("model",)),
        ((0, 2, 4, 6), ("expert",)),
        ((1, 9), ("data",)),
        ((0, 2, 4, 6, 8, 10, 12, 14), ("data", "expert")),
        ((), ("data", "expert", "model")),
        ((3,), ()),
    ],
)
def test_a_group_lies_along_axes_of_the_mesh(group: tuple[int, ...], axes: tuple[str, ...]) -> None:
    assert axes_between(group, {"data": 2, "expert": 4, "model": 2}) == axes


# An all-gather that a TPU does in steps, each fused with a product, and another one.
STEPS = """
%start (p0: f32[2,8]) -> f32[16,8] {
  %p0 = f32[2,8]{1,0} parameter(0)
  ROOT %g0 = f32[16,8]{1,0} all-gather(%p0), channel_id=7, replica_groups=[1,8]<=[8], frontend_attributes={chain_id="2"}
}

%async_collective_fusion (p1: f32[2,8]) -> f32[16,8] {
  %p1 = f32[2,8]{1,0} parameter(0)
  ROOT %g1 = f32[16,8]{1,0} all-gather(%p1), channel_id=7, replica_groups=[1,8]<=[8], frontend_attributes={chain_id="2"}
}

ENTRY %main (a: f32[2,8]) -> f32[16,8] {
  %a = f32[2,8]{1,0} parameter(0)
  %b = f32[16,8]{1,0} fusion(%a), kind=kCustom, calls=%start
  %c = f32[16,8]{1,0} fusion(%a), kind=kOutput, calls=%async_collective_fusion
  ROOT %d = f32[16,8]{1,0} all-gather(%a), channel_id=8, replica_groups=[1,8]<=[8]
}
"""


def test_steps_of_one_collective_count_as_one() -> None:
    assert traffic(collectives(hlo.parse(STEPS))) == {"all-gather": Traffic(2, 2 * 16 * 8 * 4)}


SCATTER = """
%all-reduce-scatter.5 (p: f32[16,8]) -> f32[2,8] {
  %p = f32[16,8]{1,0} parameter(0)
  %sum = f32[16,8]{1,0} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}
  %i = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %part = f32[2,8]{1,0} dynamic-slice(%sum, %i, %zero), dynamic_slice_sizes={2,8}
}

ENTRY %main (a: f32[16,8]) -> f32[2,8] {
  %a = f32[16,8]{1,0} parameter(0)
  %whole = f32[16,8]{1,0} all-reduce(%a), replica_groups={}
  ROOT %f = f32[2,8]{1,0} fusion(%whole), kind=kCustom, calls=%all-reduce-scatter.5
}
"""


def test_an_all_reduce_of_which_a_part_is_kept_is_a_reduce_scatter_on_tpus() -> None:
    whole = Traffic(1, 16 * 8 * 4)
    assert traffic(collectives(hlo.parse(SCATTER))) == {"all-reduce": whole, "reduce-scatter": whole}


def test_shapes_say_their_bytes_and_where_they_lie() -> None:
    text = "(f32[8,128]{1,0:T(8,128)S(1)}, bf16[3]{0}, pred[7], s4[3,3], f8e4m3fn[2], s32[], token[])"
    shapes = hlo.parse_shapes(text)
    assert [shape.bytes for shape in shapes] == [4096, 6, 7, 5, 2, 4, 0]
    assert [shape.in_hbm for shape in shapes[:2]] == [False, True]


def test_text_without_a_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no HLO module"):
        hlo.parse("nothing")


# Convolutions as TPUs write products: a batched one (2 x [3,4] @ [4,5]) has its batch as a dilated window dimension.
PRODUCTS = """
ENTRY %main (a: f32[3,4], b: f32[4,5]) -> f32[3,5] {
  %a = f32[3,4]{1,0} parameter(0)
  %b = f32[4,5]{1,0} parameter(1)
  %c = f32[2,3,4]{2,1,0} parameter(2)
  %d = f32[2,4,5]{2,1,0} parameter(3)
  %plain = f32[3,5]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
  %batched = f32[2,3,5]{2,1,0} convolution(%c, %d), window={size=2 lhs_dilate=2}, dim_labels=0bf_0io->0bf
  ROOT %dot = f32[3,5]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_products_count_only_what_is_there() -> None:
    # 2 x 3 x 4 x 5 each, the batched one twice: a window of the dilated input meets one element at a time.
    assert matmul_flops(hlo.parse(PRODUCTS)) == 120 + 240 + 120


KERNELS = """
ENTRY %main (a: f32[3,4], b: f32[4,5]) -> f32[3,5] {
  %a = f32[3,4]{1,0} parameter(0)
  %b = f32[4,5]{1,0} parameter(1)
  %mark = () custom-call(%a), custom_call_target="ConcatBitcast"
  ROOT %gmm = f32[3,5]{1,0} custom-call(%a, %b), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"120"}}}
}
"""  # noqa: E501


def test_a_kernel_counts_as_what_it_says() -> None:
    assert matmul_flops(hlo.parse(KERNELS)) == 120


@pytest.mark.skipif(not find_spec("libtpu"), reason="the TPU compiler is not installed")
def test_grouped_products_of_tpus_count_in_both_directions() -> None:
    place = SingleDeviceSharding(describe_devices(parse_slice("v5e:1x1"))[0])
    rows, weights, sizes = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for shape, dtype in (((256, 128), jnp.bfloat16), ((4, 128, 256), jnp.bfloat16), ((4,), jnp.int32))
    )

    def loss(rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(grouped_product(rows, weights, sizes).astype(jnp.float32)))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=place)
    with compiled_programs_in(None):  # what is compiled for a device that is not there cannot be read again
        compiled = gradient.lower(rows, weights, sizes).compile()
    assert matmul_flops(hlo.parse_compiled(compiled)) == 3 * 2 * 256 * 128 * 256


FUSED = """
%slice_and_update (p0: f32[6,1024], p1: f32[6,1024], p2: s32[]) -> (f32[6,1024], f32[1024]) {
  %p0 = f32[6,1024]{1,0} parameter(0)
  %p1 = f32[6,1024]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %layer = f32[1,1024]{1,0} dynamic-slice(%p0, %p2, %zero), dynamic_slice_sizes={1,1024}
  %stacked = f32[6,1024]{1,0} dynamic-update-slice(%p1, %layer, %p2, %zero)
  %flat = f32[1024]{0} bitcast(%layer)
  ROOT %both = (f32[6,1024]{1,0}, f32[1024]{0}) tuple(%stacked, %flat)
}

ENTRY %main (a: f32[6,1024], b: f32[6,1024], i: s32[]) -> f32[1024] {
  %a = f32[6,1024]{1,0} parameter(0)
  %b = f32[6,1024]{1,0} parameter(1)
  %i = s32[]{:S(2)} parameter(2)
  %fused = (f32[6,1024]{1,0}, f32[1024]{0:T(1024)S(1)}) fusion(%a, %b, %i), kind=kLoop, calls=%slice_and_update
  %near = f32[1024]{0:T(1024)S(1)} get-tuple-element(%fused), index=1
  ROOT %far = f32[1024]{0} negate(%near)
}
"""


def test_memory_traffic_counts_slices_and_updates_in_place_and_nothing_on_the_chip() -> None:
    layer = 1024 * 4
    # Read a layer, write it into the stack; the copy that stays on the chip is free; the result is written.
    assert memory_traffic(hlo.parse(FUSED)) == 3 * layer


def test_a_compiled_scan_counts_its_collectives_and_products_each_turn() -> None:
    mesh = make_mesh(MeshConfig(expert=8))

    def exchange(x: jax.Array) -> jax.Array:
        def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jax.lax.all_to_all(x @ x.T @ x, EXPERT, 0, 0, tiled=True), None

        return jax.lax.scan(body, x, None, length=7)[0]

    spec = PartitionSpec(EXPERT)
    step = jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=spec))
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=NamedSharding(mesh, spec))
    program = hlo.parse_compiled(step.lower(x).compile())
    found = collectives(program)
    assert traffic(found) == {"all-to-all": Traffic(7, 7 * 8 * 16 * 4)}
    assert found[0].group == tuple(range(8))
    assert matmul_flops(program) == 7 * 2 * (2 * 8 * 8 * 16)


@pytest.mark.slow
def test_a_train_step_holds_4_all_to_alls_a_moe_layer(tiny: Config) -> None:
    layers = 4
    config = changed(tiny, model={"num_encoder_layers": 2 * layers, "num_decoder_layers": 2 * layers})
    mesh = make_mesh(config.mesh)
    program = hlo.parse_compiled(lower_train_step(config, plan_state(config, mesh), mesh).compile())
    totals = traffic(collectives(program))
    assert totals["all-to-all"].count == 4 * 2 * layers
    assert "all-gather" not in totals
    assert saved_activations(program) > 0
