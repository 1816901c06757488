"""FLOPs, memory and communication by arithmetic, against the papers, XLA and optax."""

import jax
import pytest

from switchjax.accounting.accounting import account, mesh_axes
from switchjax.config import Config, ModelConfig
from switchjax.models.families import FAMILIES, build
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import named_leaves
from switchjax.planning.topology import state_bytes
from switchjax.training.optimizer import make_optimizer
from switchjax.training.state import plan_state
from tests.test_configs import config_of
from tests.tiny import changed


@pytest.mark.parametrize(
    ("name", "size", "model", "flops"),
    [
        ("t5", "base", {}, 124e9),
        ("t5", "large", {}, 425e9),
        ("t5", "xxl", {}, 6.3e12),
        ("switch", "c", {"num_heads": 32}, 890e9),
    ],
)
def test_forward_flops_of_a_sequence_are_the_printed_ones(name: str, size: str, model: dict, flops: float) -> None:
    assert account(changed(config_of(name, size), model=model)).forward_flops == pytest.approx(flops, rel=0.01)


def test_a_sparse_model_has_the_flops_of_its_dense_one() -> None:
    dense, sparse = account(config_of("t5", "base")), account(config_of("switch", "base-256"))
    assert sparse.forward_flops == dense.forward_flops


@pytest.mark.parametrize(
    ("key", "total", "active", "flops"),
    [
        ("base_layers:128", 5_610_690_560, 1_347_457_024, 2_856_492_990_464),
        ("hash_layers:5x16", 782_813_184, 153_283_584, 328_734_867_456),
        ("peer:1024x1024", 1_718_934_272, 108_518_144, 507_343_011_840),
        ("mswitch:base", 7_774_715_136, 583_580_928, 338_404_509_696),
        ("vmoe:l-32-last2", 845_784_947, 342_161_267, 32_347_428_864),
        ("families:pr-moe", 350_880, 144_960, 42_467_328),
        ("families:lstm-moe", 235_392, 124_800, 31_457_280),
        ("quickstart:switch", 1_149_696, 461_568, 76_808_192),
    ],
)
def test_models_without_a_printed_figure_cost_what_their_architecture_says(
    key: str, total: int, active: int, flops: int
) -> None:
    """The numbers follow from a list of all weights, written by hand for each kind of layer."""
    accounting = account(config_of(*key.split(":")))
    assert (accounting.total, accounting.active, accounting.forward_flops) == (total, active, flops)


@pytest.mark.parametrize(
    ("name", "size", "layers"),
    [
        ("t5", "xxl", 1),
        ("switch", "base-8", 2),
        ("switch", "c", 1),
        ("st_moe", "32b", 4),
        ("meta_moe", "1.1t", 2),
        ("mixtral", "8x7b", 1),
        ("glam", "64b-64e", 2),
        ("deepspeed_moe", "1.3b-mos", 0),
        ("vmoe", "h-14-last5", 0),
        ("base_layers", "128", 0),
        ("expert_choice", "8b-64e", 2),
        ("peer", "1024x1024", 0),
        ("shazeer_lstm", "moe-143m", 0),
    ],
)
def test_computed_flops_are_xlas(name: str, size: str, layers: int) -> None:
    """FLOPs of a model with so many layers in each stack, or with all; each layer costs the same."""
    config = config_of(name, size)
    depth = {f"num_{stack}_layers": layers for stack in config.model.stacks} if layers else {}
    # XLA counts a loop once, and a cast of each weight, which is dear beside a batch of 8.
    config = changed(
        config,
        model={**depth, "scan_layers": False, "dtype": "float32"},
        moe={"eval_capacity_factor": config.moe.train_capacity_factor},
        data={"batch_size": 8},
    )
    model = jax.eval_shape(lambda: build(config, jax.random.key(0)))
    batch = FAMILIES[config.model.family].batch_shapes(config)
    lowered = jax.jit(lambda model, batch: model(batch, None)).lower(model, batch)
    flops = lowered.cost_analysis()["flops"] / 8
    assert sum(account(config).computed_flops.values()) == pytest.approx(flops, rel=0.05)


@pytest.mark.parametrize(
    ("name", "size"), [("switch", "c"), ("t5", "base"), ("mixtral", "8x7b"), ("vmoe", "s-32-last2")]
)
def test_the_optimisers_state_is_as_large_as_optax_makes_it(name: str, size: str) -> None:
    config = changed(config_of(name, size), mesh={"expert": 1})
    model = jax.eval_shape(lambda: build(config, jax.random.key(0)))
    state = jax.eval_shape(make_optimizer(config, model).init, named_leaves(model))
    bytes_of = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert account(config).memory.optimizer == pytest.approx(bytes_of, rel=1e-4)  # counts of steps are left out


def test_devices_divide_experts_heads_and_hidden_layers(tiny: Config) -> None:
    whole = account(changed(tiny, mesh={"data": 1, "expert": 1}))
    assert whole.memory.parameters == 4 * whole.total
    model = tiny.model
    experts = 2 * 4 * 2 * model.d_model * model.d_ff  # one MoE layer a stack, four experts of two matrices
    assert whole.parameters["experts"] == experts
    spread = account(changed(tiny, mesh={"data": 1, "expert": 4}))
    assert spread.memory.parameters == 4 * (whole.total - experts + experts // 4)
    sliced = account(changed(tiny, mesh={"data": 1, "expert": 1, "model": 2}))
    kept = whole.parameters["norms"] + whole.parameters["routers"]
    assert sliced.memory.parameters == 4 * (kept + (whole.total - kept) // 2)


@pytest.mark.parametrize("sharded", ["none", "optimizer", "parameters"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_memory_of_parameters_and_optimiser_is_that_of_the_real_shardings(
    tiny: Config, optimizer: str, sharded: str
) -> None:
    wide = changed(
        tiny, model={"d_model": 128, "d_ff": 256, "num_heads": 4, "d_head": 32}, optimizer={"name": optimizer}
    )
    config = changed(wide, mesh={"data": 2, "expert": 2, "model": 2, "sharded": sharded})
    parameters, state = state_bytes(plan_state(config, make_mesh(config.mesh)))
    memory = account(config, devices=8).memory
    assert memory.parameters == parameters
    # optax's counts of steps, and a number in the place of each array that it does not keep, are left out in part.
    assert memory.optimizer == pytest.approx(state, rel=0.01)


def test_tokens_travel_to_experts_and_back_in_both_passes(tiny: Config) -> None:
    moe = {"group_size": 32, "train_capacity_factor": 1.0}
    config = changed(tiny, moe=moe, mesh={"data": 2, "expert": 4}, data={"encoder_length": 64, "decoder_length": 32})
    tokens = config.data.batch_size * (64 + 32)  # one MoE layer a stack
    sent = 4 * tokens * config.model.d_model * 4  # of float32, four times
    assert account(config).communication.all_to_all == sent // 8
    two = {"router": "top_k", "num_selected_experts": 2, "fill_order": "token_by_token"}
    assert account(changed(config, moe=two)).communication.all_to_all == 2 * sent // 8
    assert account(changed(config, model={"remat": "full"})).communication.all_to_all == 6 * sent // 4 // 8
    assert account(changed(config, model={"remat": "exchange"})).communication.all_to_all == sent // 8
    assert account(changed(config, mesh={"expert": 1})).communication.all_to_all == 0


def test_a_base_layer_also_shuffles(tiny: Config) -> None:
    model = {"family": "decoder_only", "pattern": ("dense", "base"), "num_decoder_layers": 2}
    data = {"objective": "causal", "decoder_length": 32}
    moe = {"router": "base", "group_size": 32}
    config = changed(tiny, model=model, data=data, moe=moe, mesh={"data": 2, "expert": 4})
    tokens = config.data.batch_size * 32
    assert account(config).communication.all_to_all == (4 + 4) * tokens * config.model.d_model * 4 // 8


def test_gradients_of_what_devices_share_are_reduced(tiny: Config) -> None:
    accounting = account(changed(tiny, mesh={"data": 2, "expert": 4}))
    shared = accounting.total - accounting.parameters["experts"]
    assert accounting.communication.gradient_all_reduce == 4 * (shared + accounting.parameters["experts"] // 4)
    alone = account(changed(tiny, mesh={"data": 1, "expert": 4}))
    assert alone.communication.gradient_all_reduce == 4 * shared


def test_recomputed_layers_keep_only_their_inputs() -> None:
    config = changed(config_of("t5", "large"), mesh={"data": 1})
    full = account(changed(config, model={"remat": "full"})).memory.activations
    rows = config.data.batch_size * (512 + 114)
    inputs = 24 * rows * config.model.d_model * 2
    assert inputs < full < account(config).memory.activations / 4


def test_data_takes_the_devices_that_are_left(tiny: Config) -> None:
    config = changed(tiny, mesh={"data": -1, "expert": 4, "model": 2})
    assert mesh_axes(config, 64) == {"data": 8, "expert": 4, "model": 2}
    assert mesh_axes(config, 1) == {"data": 1, "expert": 4, "model": 2}
    assert mesh_axes(changed(config, mesh={"data": 3}), 64)["data"] == 3


def test_the_whole_run() -> None:
    config = Config(model=ModelConfig(pattern=("dense",)))
    accounting = account(config)
    sequences = config.train.steps * config.data.batch_size
    assert accounting.training_flops == 3 * sum(accounting.computed_flops.values()) * sequences
    assert 0.8 < accounting.training_flops_6nd / accounting.training_flops < 1  # without attention's scores


def test_six_nd_counts_a_token_in_its_own_stack_alone() -> None:
    model = {"biases": False, "num_encoder_layers": 3, "num_decoder_layers": 2, "pattern": ("dense",)}
    config = changed(Config(), model=model)
    accounting = account(config)
    attention, feed_forward = 4 * 768 * 12 * 64 + 768, 2 * 768 * 3072 + 768  # each with its norm
    encoder, decoder = 3 * (attention + feed_forward), 2 * (2 * attention + feed_forward)
    rest = accounting.active - encoder - decoder
    sequences = config.train.steps * config.data.batch_size
    assert accounting.training_flops_6nd == 6 * sequences * (encoder * 512 + (decoder + rest) * 114)
