"""The sections around model and data: mesh, optimizer, train, evaluate, init_from."""

from dataclasses import dataclass
from typing import Literal

from switchjax.config.checks import (
    check_choices,
    check_fraction,
    check_not_negative,
    check_positive,
    check_seed,
    require,
)


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; -1 for `data` means all devices that the other axes leave."""

    data: int = -1
    expert: int = 1
    model: int = 1
    sharded: Literal["none", "optimizer", "parameters"] = "none"
    """Also divided over the shards of the batch (data x expert): nothing (none); the optimiser's state (optimizer: ZeRO
    stage 1); parameters, gradients and the optimiser's state (parameters: ZeRO stage 3, FSDP)."""
    emulated_devices: int = 0
    """If the CPU is the only device: number of devices to emulate, over all processes; 0: do not emulate."""

    def __post_init__(self) -> None:
        check_choices("mesh", self)
        check_positive("mesh", {"expert": self.expert, "model": self.model})
        require(self.data == -1 or self.data > 0, f"mesh.data must be positive or -1, got {self.data}")
        check_not_negative("mesh", {"emulated_devices": self.emulated_devices})


@dataclass(frozen=True)
class OptimizerConfig:
    """Adafactor with T5's settings, or AdamW, and the learning rate's schedule."""

    name: Literal["adafactor", "adamw"] = "adafactor"
    learning_rate: float = 1.0
    schedule: Literal["rsqrt", "cosine", "linear", "constant"] = "rsqrt"
    warmup_steps: int = 10_000
    clip_norm: float = 0.0
    """Largest global norm of the gradient; 0: no clipping."""
    decay_rate: float = 0.8
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_choices("optimizer", self)
        check_positive("optimizer", {"learning_rate": self.learning_rate})
        check_fraction("optimizer", {"b1": self.b1, "b2": self.b2, "decay_rate": self.decay_rate})
        sizes = ("warmup_steps", "clip_norm", "weight_decay")
        check_not_negative("optimizer", {name: getattr(self, name) for name in sizes})

    @property
    def ends_at_zero(self) -> bool:
        """True if the learning rate falls to 0 at the last step, so that it depends on `train.steps`."""
        return self.schedule in ("cosine", "linear")


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run, its output, and its reactions to errors."""

    steps: int = 100_000
    seed: int = 0
    accumulation_steps: int = 1
    """Micro-batches per step. Each draws its own noise; without noise, gradients equal those of the whole batch."""
    z_loss_weight: float = 1e-4
    log_every: int = 10
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    trace_first_step: int = 10
    trace_steps: int = 0
    """Number of steps, from `trace_first_step` on, whose profiler trace is written to the workdir; 0: none."""
    non_finite: Literal["stop", "skip"] = "stop"
    """Reaction to a loss or gradient that is not finite: stop the run, or skip the step, which then changes neither
    parameters nor the optimiser's state and count of updates."""
    max_skipped_steps: int = 10
    """Largest number of consecutive skipped steps; one more stops the run."""
    step_timeout: int = 1800
    """Seconds after which an unfinished step, or the reading of its batch, ends the run; 0: never."""
    heartbeat_timeout: int = 100
    """Seconds after which a silent process counts as dead, which ends a run of several processes."""

    def __post_init__(self) -> None:
        sizes = ["steps", "accumulation_steps", "log_every", "checkpoint_every", "keep_checkpoints", "trace_first_step"]
        sizes += ["max_skipped_steps", "heartbeat_timeout"]
        check_choices("train", self)
        check_positive("train", {name: getattr(self, name) for name in sizes})
        check_seed("train.seed", self.seed)
        counts = ("step_timeout", "z_loss_weight", "trace_steps")
        check_not_negative("train", {name: getattr(self, name) for name in counts})


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out evaluation during and after training."""

    every: int = 1000
    """Number of steps between evaluations; 0: only at the end."""
    batches: int = 16
    """Number of batches per corpus; 0: the whole split."""
    split: Literal["train", "validation", "test"] = "validation"

    def __post_init__(self) -> None:
        check_choices("evaluate", self)
        check_not_negative("evaluate", {"every": self.every, "batches": self.batches})


@dataclass(frozen=True)
class InitFromConfig:
    """The source of a new run's weights; an empty `workdir` means random initialisation.

    The run takes the parameters with the same name by layer (`encoder/3/ff/experts/w_in`), whatever the source's depth
    and pattern are. It initialises all others, which the log lists.
    """

    workdir: str = ""
    step: int = -1
    """Step of the checkpoint; -1: the latest."""
