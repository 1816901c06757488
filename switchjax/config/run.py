"""The sections around model and data: mesh, optimizer, train, evaluate, init_from."""

from dataclasses import dataclass
from typing import Literal

from switchjax.config.checks import check_choices, check_fraction, check_positive, check_seed, require


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the named mesh axes; -1 for `data` takes the devices that the others leave."""

    data: int = -1
    expert: int = 1
    model: int = 1
    sharded: Literal["none", "optimizer", "parameters"] = "none"
    """What the devices that divide the batch (data x expert) divide among themselves: none; optimizer, its state (ZeRO
    stage 1); parameters, these with their gradients and the optimiser's state (ZeRO stage 3, FSDP)."""
    emulated_devices: int = 0
    """Where the CPU is the only device: how many to emulate, all processes together (0: leave as it is)."""

    def __post_init__(self) -> None:
        check_choices("mesh", self)
        check_positive("mesh", {"expert": self.expert, "model": self.model})
        require(self.data == -1 or self.data > 0, f"mesh.data must be positive or -1, got {self.data}")
        require(self.emulated_devices >= 0, "mesh.emulated_devices must not be negative")


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
        for name in ("warmup_steps", "clip_norm", "weight_decay"):
            require(getattr(self, name) >= 0, f"optimizer.{name} must not be negative, got {getattr(self, name)}")

    @property
    def ends_at_zero(self) -> bool:
        """Whether the learning rate goes down to 0 at the last step, so that all depend on `train.steps`."""
        return self.schedule in ("cosine", "linear")


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run and what it writes."""

    steps: int = 100_000
    seed: int = 0
    accumulation_steps: int = 1
    """Micro-batches a step; without noise, which each draws for itself, gradients equal those of the whole batch."""
    z_loss_weight: float = 1e-4
    log_every: int = 10
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    trace_first_step: int = 10
    trace_steps: int = 0
    """Steps, from `trace_first_step` on, of which a profiler's trace is written into the workdir; 0: none."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite does: stop the run, or skip the step, which then leaves parameters and
    optimiser, its count of updates too, as they are."""
    max_skipped_steps: int = 10
    """Largest number of steps that are skipped in a row; one more stops the run."""
    step_timeout: int = 1800
    """Seconds after which a step, or the reading of its batch, is given up, which ends the run; 0: never."""
    heartbeat_timeout: int = 100
    """Seconds after which a process that does not answer counts as dead, which ends the run of several processes."""

    def __post_init__(self) -> None:
        sizes = (
            "steps",
            "accumulation_steps",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
            "trace_first_step",
            "max_skipped_steps",
            "heartbeat_timeout",
        )
        check_choices("train", self)
        check_positive("train", {name: getattr(self, name) for name in sizes})
        check_seed("train.seed", self.seed)
        require(self.step_timeout >= 0, f"train.step_timeout must not be negative, got {self.step_timeout}")
        require(self.z_loss_weight >= 0, f"train.z_loss_weight must not be negative, got {self.z_loss_weight}")
        require(self.trace_steps >= 0, f"train.trace_steps must not be negative, got {self.trace_steps}")


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out evaluation during and after training."""

    every: int = 1000
    """Steps between evaluations; 0: only at the end."""
    batches: int = 16
    """Batches a corpus; 0: the whole split."""
    split: Literal["train", "validation", "test"] = "validation"

    def __post_init__(self) -> None:
        check_choices("evaluate", self)
        require(self.every >= 0, f"evaluate.every must not be negative, got {self.every}")
        require(self.batches >= 0, f"evaluate.batches must not be negative, got {self.batches}")


@dataclass(frozen=True)
class InitFromConfig:
    """Where a new run takes its weights from; an empty `workdir` means random initialisation.

    It takes parameters of the same name by layer (`encoder/3/ff/experts/w_in`), whatever the depth and the pattern
    there, and makes the others new; the log tells which.
    """

    workdir: str = ""
    step: int = -1
    """Checkpoint of that workdir; -1: the latest."""
