"""What experts and sharding cost a train step, beside a dense T5 and one device."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from switchjax.accounting.accounting import account
from switchjax.accounting.hardware import peak_flops
from switchjax.accounting.utilization import model_flops
from switchjax.config import Config, DataConfig, MeshConfig, ModelConfig, MoEConfig
from switchjax.models.families import FAMILIES
from switchjax.parallel.mesh import check_fit, make_mesh
from switchjax.parallel.sharding import place_batch
from switchjax.studies.markdown import show_row
from switchjax.studies.timing import Program, Ratio, interleaved_seconds
from switchjax.training.state import plan_state
from switchjax.training.step import lower_train_step

DEVICES = 8
"""What the sharded step runs on."""
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
    # Groups as large as the decoder's rows of all devices together allow, and as a device of 8 has.
    moe=MoEConfig(train_capacity_factor=1.25, group_size=2048),
    data=DataConfig(batch_size=16, encoder_length=512, decoder_length=128),
)
"""A T5 of the proportions of T5-Base, small enough for two cores; a Switch Transformer has an MoE layer in the place of
every other feed-forward network, and as many FLOPs a token."""


@dataclass(frozen=True)
class StepCase:
    """One row of the table: its speed over that of the case `beside`."""

    name: str
    config: Config
    beside: str = ""
    aim: float = 0.0
    devices: int = 1


def cases(dense: Config) -> tuple[StepCase, ...]:
    """The dense model, models with more and more experts as its `moe` has them, and one of them on one device and on
    all, where there are so many."""
    dense = replace(dense, model=replace(dense.model, pattern=("dense", "dense")), mesh=MeshConfig())
    routed = replace(dense.moe, experts_per_layer=())
    selected = f", K = {routed.num_selected_experts}" if routed.num_selected_experts > 1 else ""
    few, many = (0.0, 0.0) if selected else (0.92, 0.85)  # a second expert is more work, not overhead

    def name(num_experts: int) -> str:
        return f"{routed.router}{selected}, {num_experts} experts"

    def sparse(num_experts: int, group_size: int = routed.group_size) -> Config:
        model = replace(dense.model, pattern=("dense", "moe"))
        return replace(dense, model=model, moe=replace(routed, num_experts=num_experts, group_size=group_size))

    alone = (
        StepCase("dense", dense),
        StepCase(name(32), sparse(32), "dense", few),
        StepCase(name(128), sparse(128), "dense", many),
    )
    if jax.device_count() < DEVICES:
        return alone
    small_groups = sparse(32, dense.data.batch_size // DEVICES * dense.data.decoder_length)
    one = f"{name(32)}, groups for {DEVICES} devices"
    return (
        *alone,
        StepCase(one, small_groups),
        StepCase(f"the same on {DEVICES} devices", replace(small_groups, mesh=_MESH), one, 0.85, DEVICES),
    )


def train_program(config: Config, devices: Sequence[jax.Device]) -> Program:
    """Takes a train step on full rows of random tokens each time that it is called."""
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
    """A global batch of random tokens without padding, each row one segment."""
    shapes = FAMILIES[config.model.family].batch_shapes(config)
    rng = np.random.default_rng(config.data.seed)
    return {
        name: np.ones(array.shape, array.dtype)
        if name.endswith("segments")
        else rng.integers(3, config.model.vocab_size, array.shape).astype(array.dtype)
        for name, array in shapes.items()
    }


def benchmark_step(dense: Config, repeats: int, report: Callable[[str], None]) -> str:
    """Times a train step of each of `cases`, all in turn, and returns the table.

    Args:
        dense: as `DENSE`.
        repeats: rounds, whose medians count.
        report: is told of each step that is compiled.
    """
    table = cases(dense)
    programs: dict[str, Program] = {}
    for case in table:
        report(f"compiling {case.name}")
        programs[case.name] = train_program(case.config, jax.devices()[: case.devices])
    report(f"{repeats} rounds")
    seconds = interleaved_seconds(programs, repeats)
    tokens = dense.data.batch_size * sum(dense.stack_lengths.values())
    peak = peak_flops(jax.devices()[0].device_kind)
    utilization = {"MFU": "---:"} if peak else {}
    head = {"train step": "---", "parameters": "---:", "ms": "---:", "tokens/s": "---:"} | utilization
    head |= {"its tokens/s over those of": "---", "": "---:", "aim": "---:"}
    lines = [show_row(head), f"|{'|'.join(head.values())}|"]
    for case in table:
        median = statistics.median(seconds[case.name])
        cells = [case.name, f"{account(case.config).total:,}", f"{1000 * median:.0f}", f"{tokens / median:,.0f}"]
        if peak:
            rate = model_flops(case.config) / median
            cells.append(f"{rate / (peak * case.devices):.3f}")
        ratio = Ratio.of(seconds[case.beside], seconds[case.name]) if case.beside else ""
        cells += [case.beside, str(ratio), f"{case.aim}" if case.aim else ""]
        lines.append(show_row(cells))
    return "\n".join(lines)
