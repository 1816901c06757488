"""Times a train step with experts beside a dense T5's, and on eight devices beside one."""

import logging
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import jax
import numpy as np

from switchjax.accounting.accounting import account
from switchjax.accounting.hardware import peak_flops
from switchjax.accounting.utilization import model_flops
from switchjax.config import Config, DataConfig, MeshConfig, ModelConfig, MoEConfig
from switchjax.models.families import FAMILIES
from switchjax.parallel.mesh import check_fit, emulate_devices, make_mesh
from switchjax.parallel.sharding import place_batch
from switchjax.studies.flags import LoadConfig, add_repeats
from switchjax.studies.report import Row, number, text
from switchjax.studies.timing import Program, Ratio, interleaved_seconds
from switchjax.training.state import plan_state
from switchjax.training.step import lower_train_step

DEVICES = 8
"""Devices of the sharded step."""
_log = logging.getLogger(__name__)
_MESH = MeshConfig(data=2, expert=4)

DENSE = Config(
    model=ModelConfig(
        vocab_size=2048,
        d_model=256,
        d_ff=1024,
        num_heads=4,
        d_head=64,
        num_encoder_layers=2,
        num_decoder_layers=2,
        pattern=("dense", "dense"),
    ),
    # A group of 2048 tokens is the decoder's whole batch on one device.
    moe=MoEConfig(train_capacity_factor=1.25, group_size=2048),
    data=DataConfig(batch_size=16, encoder_length=512, decoder_length=128),
)
"""A T5 with the proportions of T5-Base, small enough for two cores. A Switch Transformer replaces every other
feed-forward network with an MoE layer and has as many FLOPs a token."""


@dataclass(frozen=True)
class StepCase:
    """A train step, and the name of the case that its speed is compared with."""

    name: str
    config: Config
    beside: str | None = None
    aim: float | None = None
    devices: int = 1


@dataclass(frozen=True)
class StepRow:
    """Median speed of a train step."""

    name: Annotated[str, text("train step")]
    parameters: Annotated[int, number("parameters", "{:,}".format)]
    milliseconds: Annotated[float, number("ms", "{:.0f}".format)]
    tokens_per_second: Annotated[float, number("tokens/s", "{:,.0f}".format)]
    mfu: Annotated[float | None, number("MFU", "{:.3f}".format)]
    """Model FLOPs utilisation; None if the peak of the devices is unknown."""
    beside: Annotated[str | None, text("its tokens/s over those of")]
    ratio: Annotated[Ratio | None, number("")]
    aim: Annotated[float | None, number("aim")]


def add_flags(parser: ArgumentParser) -> None:
    add_repeats(parser, 7)
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--huggingface", action="store_true", help="time small models beside transformers' in PyTorch")
    instead = "time models of this config instead of small ones; --config.SECTION.KEY=VALUE changes it"
    models.add_argument("--config", metavar="CONFIG", help=instead)
    parser.set_defaults(overrides=[])


def measure(flags: Namespace, load: LoadConfig) -> Iterator[Row]:
    """Times the cases of the flags' config, or small models beside transformers' own."""
    if flags.huggingface:
        from switchjax.studies.beside_transformers import measure_training

        yield from measure_training(flags.repeats)
        return
    dense = load(flags.config, flags.overrides) if flags.config else DENSE
    emulate_devices(MeshConfig(emulated_devices=DEVICES))
    compared, programs = cases(dense), {}
    for case in compared:
        _log.info("compiling %s", case.name)
        programs[case.name] = train_program(case.config, jax.devices()[: case.devices])
    seconds = interleaved_seconds(programs, flags.repeats)
    peak = peak_flops(jax.devices()[0].device_kind)
    yield from (make_row(case, seconds, peak) for case in compared)


def make_row(case: StepCase, seconds: Mapping[str, list[float]], peak: float | None) -> StepRow:
    """Makes the row of a case from all cases' seconds, by name, and from a device's peak FLOP/s if it is known."""
    config, median = case.config, statistics.median(seconds[case.name])
    return StepRow(
        name=case.name,
        parameters=account(config).total,
        milliseconds=1000 * median,
        tokens_per_second=config.data.batch_size * sum(config.stack_lengths.values()) / median,
        mfu=model_flops(config) / median / (peak * case.devices) if peak else None,
        beside=case.beside,
        ratio=Ratio.of(seconds[case.beside], seconds[case.name]) if case.beside else None,
        aim=case.aim,
    )


def cases(dense: Config) -> list[StepCase]:
    """The dense model and its models with 32 and 128 experts; with enough devices, one more on 1 and on `DEVICES`."""
    dense = replace(dense, model=replace(dense.model, pattern=("dense", "dense")), mesh=MeshConfig())
    routed = replace(dense.moe, experts_per_layer=())
    selected = f", K = {routed.num_selected_experts}" if routed.num_selected_experts > 1 else ""
    few, many = (None, None) if selected else (0.92, 0.85)  # a second expert is more work, not overhead

    def name(num_experts: int) -> str:
        return f"{routed.router}{selected}, {num_experts} experts"

    def sparse(num_experts: int, group_size: int = routed.group_size) -> Config:
        model = replace(dense.model, pattern=("dense", "moe"))
        return replace(dense, model=model, moe=replace(routed, num_experts=num_experts, group_size=group_size))

    found = [
        StepCase("dense", dense),
        StepCase(name(32), sparse(32), "dense", few),
        StepCase(name(128), sparse(128), "dense", many),
    ]
    if jax.device_count() >= DEVICES:
        one = f"{name(32)}, groups for {DEVICES} devices"
        config = sparse(32, dense.data.batch_size // DEVICES * dense.data.decoder_length)
        found.append(StepCase(one, config))
        found.append(StepCase(f"the same on {DEVICES} devices", replace(config, mesh=_MESH), one, 0.85, DEVICES))
    return found


def train_program(config: Config, devices: Sequence[jax.Device]) -> Program:
    """A program that takes one more train step at each call, on full rows of random tokens."""
    mesh = make_mesh(config.mesh, devices)
    check_fit(config, mesh)
    plan = plan_state(config, mesh)
    with jax.set_mesh(mesh):
        state = plan.create()
        compiled = lower_train_step(config, plan, mesh).compile()
        batch = place_batch(random_rows(config), mesh)

    def step() -> object:
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics

    return step


def random_rows(config: Config) -> dict[str, np.ndarray]:
    """A global batch of random tokens without padding; each row is one segment."""
    shapes = FAMILIES[config.model.family].batch_shapes(config)
    rng = np.random.default_rng(config.data.seed)
    return {
        name: np.ones(array.shape, array.dtype)
        if name.endswith("segments")
        else rng.integers(3, config.model.vocab_size, array.shape).astype(array.dtype)
        for name, array in shapes.items()
    }
