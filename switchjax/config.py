"""Typed, frozen configuration, built from `ml_collections` files, flags or a saved `config.json`.

A file in `configs/` builds a `Config` and returns `config.to_config_dict()`, so that
`--config.section.key=value` can override any field; `Config.from_dict` turns the result back into
checked dataclasses. An unknown key, a wrong type or a value out of range is a `UserError`.
This module imports no jax.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


class UserError(ValueError):
    """Something the user can put right; scripts print it as one line and exit with 2."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def suggest(name: str, candidates: typing.Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the candidate closest to `name`, or the list of them all."""
    known = list(candidates)
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else f" (known: {', '.join(known)})"


def check_choice(key: str, value: str, choices: typing.Iterable[str]) -> None:
    """Raises a `UserError` naming `key` unless `value` is one of `choices`."""
    known = list(choices)
    _require(value in known, f"{key}: unknown value '{value}'{suggest(value, known)}")


def _check_positive(section: str, values: Mapping[str, int | float]) -> None:
    for name, value in values.items():
        _require(value > 0, f"{section}.{name} must be positive, got {value}")


def _check_fraction(section: str, values: Mapping[str, int | float]) -> None:
    for name, value in values.items():
        _require(0 <= value < 1, f"{section}.{name} must be in [0, 1), got {value}")


@dataclass(frozen=True)
class ModelConfig:
    """The transformer around the experts. Sizes are named as in DESIGN's legend."""

    family: str = "encoder_decoder"
    vocab_size: int = 32128
    d_model: int = 768
    d_ff: int = 3072
    num_heads: int = 12
    d_head: int = 64
    num_encoder_layers: int = 12
    num_decoder_layers: int = 12
    pattern: tuple[str, ...] = ("dense", "moe")
    """Feed-forward kinds of one period of layers; it repeats to fill each stack."""
    activation: str = "relu"
    tie_embeddings: bool = True
    relative_buckets: int = 32
    relative_max_distance: int = 128
    dropout: float = 0.0
    scan_layers: bool = True
    """True: one compiled period in a loop. False: the loop unrolled (quickstart, CPU: 4 % faster)."""
    remat: str = "none"
    """What the backward pass computes again: none, full, dots (keeps matmuls), exchange (keeps all-to-alls)."""
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "d_model", "d_ff", "num_heads", "d_head", "num_encoder_layers", "num_decoder_layers")
        _check_positive("model", {name: getattr(self, name) for name in sizes})
        _check_fraction("model", {"dropout": self.dropout})
        check_choice("model.family", self.family, ["encoder_decoder"])
        check_choice("model.activation", self.activation, ["relu", "geglu"])
        check_choice("model.remat", self.remat, ["none", "full", "dots", "exchange"])
        for name in ("dtype", "param_dtype"):
            check_choice(f"model.{name}", getattr(self, name), ["float32", "bfloat16"])
        _require(len(self.pattern) > 0, "model.pattern must name at least one layer")
        for kind in self.pattern:
            check_choice("model.pattern", kind, ["dense", "moe"])
        for name in ("num_encoder_layers", "num_decoder_layers"):
            layers = getattr(self, name)
            _require(
                layers % len(self.pattern) == 0,
                f"model.{name}={layers} is not a multiple of the {len(self.pattern)} layers of model.pattern",
            )
        _require(
            self.relative_buckets >= 4 and self.relative_buckets % 2 == 0,
            f"model.relative_buckets must be even and at least 4, got {self.relative_buckets}",
        )
        _require(
            self.relative_max_distance > self.relative_buckets // 2,
            f"model.relative_max_distance={self.relative_max_distance} must exceed half of model.relative_buckets",
        )


@dataclass(frozen=True)
class MoEConfig:
    """Routing, capacity and losses of the MoE layers."""

    router: str = "switch"
    num_experts: int = 8
    num_selected_experts: int = 1
    group_size: int = 512
    """Most tokens that compete for the same buffers (whole rows, or an even part of one); the mesh plays no part."""
    train_capacity_factor: float = 1.25
    eval_capacity_factor: float = 2.0
    min_expert_capacity: int = 4
    jitter_noise: float = 0.01
    load_balance_loss_weight: float = 0.01
    router_z_loss_weight: float = 0.0
    expert_dropout: float = 0.0
    dispatch: str = "gather"

    def __post_init__(self) -> None:
        sizes = (
            "num_experts",
            "num_selected_experts",
            "group_size",
            "train_capacity_factor",
            "eval_capacity_factor",
            "min_expert_capacity",
        )
        _check_positive("moe", {name: getattr(self, name) for name in sizes})
        _check_fraction("moe", {"jitter_noise": self.jitter_noise, "expert_dropout": self.expert_dropout})
        check_choice("moe.dispatch", self.dispatch, ["gather", "einsum"])
        _require(
            self.num_selected_experts <= self.num_experts,
            f"moe.num_selected_experts={self.num_selected_experts} exceeds moe.num_experts={self.num_experts}",
        )
        _require(
            self.router != "switch" or self.num_selected_experts == 1,
            f"moe.router=switch selects 1 expert, but moe.num_selected_experts={self.num_selected_experts}",
        )
        for name in ("load_balance_loss_weight", "router_z_loss_weight"):
            _require(getattr(self, name) >= 0, f"moe.{name} must not be negative, got {getattr(self, name)}")

    def tokens_per_group(self, rows: int, length: int) -> int:
        """S, the tokens of a group when `rows` x `length` tokens are divided into groups of at most `group_size`.

        Rows shorter than that are grouped whole, as many as fit and divide `rows`; a longer row is divided evenly. The
        mesh plays no part, so a model computes the same on every mesh.

        Raises:
            UserError: if `group_size` does not divide a longer row.
        """
        if self.group_size >= length:
            return length * max(n for n in range(1, self.group_size // length + 1) if rows % n == 0)
        _require(
            length % self.group_size == 0,
            f"moe.group_size={self.group_size} neither divides a row of {length} tokens nor holds one",
        )
        return self.group_size


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the named mesh axes; -1 for `data` takes the devices that the others leave."""

    data: int = -1
    expert: int = 1
    model: int = 1
    emulated_devices: int = 0
    """Where the CPU is the only device: how many to emulate (0: leave as it is)."""

    def __post_init__(self) -> None:
        _check_positive("mesh", {"expert": self.expert, "model": self.model})
        _require(self.data == -1 or self.data > 0, f"mesh.data must be positive or -1, got {self.data}")
        _require(self.emulated_devices >= 0, "mesh.emulated_devices must not be negative")


@dataclass(frozen=True)
class DataConfig:
    """Corpora, vocabulary, the span corruption objective and static batch shapes."""

    corpora: tuple[str, ...] = ("c4/en",)
    """Names of the project's own sources or of any TFDS text dataset; one that cannot be had is passed over."""
    rates: tuple[float, ...] = ()
    """Sampling rates, one a corpus; empty: in proportion to their tokens."""
    text_feature: str = "text"
    directory: str = ""
    """Where prepared data lives; empty: $SWITCHJAX_DATA, or else the user's cache folder."""
    vocabulary: str = ""
    """A SentencePiece model file; empty: one of `vocabulary_size` pieces is trained on the corpora."""
    vocabulary_size: int = 2000
    num_sentinels: int = 48
    batch_size: int = 128
    """Rows of a global batch."""
    encoder_length: int = 512
    decoder_length: int = 114
    noise_density: float = 0.15
    mean_span_length: float = 3.0
    pack: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("vocabulary_size", "num_sentinels", "batch_size", "encoder_length", "decoder_length")
        _check_positive("data", {name: getattr(self, name) for name in sizes})
        _require(len(self.corpora) > 0, "data.corpora must name at least one corpus")
        _require(len(set(self.corpora)) == len(self.corpora), f"data.corpora names a corpus twice: {self.corpora}")
        _require(0 < self.noise_density < 1, f"data.noise_density must be in (0, 1), got {self.noise_density}")
        _require(self.mean_span_length >= 1, f"data.mean_span_length must be at least 1, got {self.mean_span_length}")
        _require(
            len(self.rates) in (0, len(self.corpora)),
            f"data.rates has {len(self.rates)} values for {len(self.corpora)} corpora",
        )
        _check_positive("data", {f"rates[{i}]": rate for i, rate in enumerate(self.rates)})


@dataclass(frozen=True)
class OptimizerConfig:
    """Adafactor with T5's settings, or AdamW, and the learning rate's schedule."""

    name: str = "adafactor"
    learning_rate: float = 1.0
    schedule: str = "rsqrt"
    warmup_steps: int = 10_000
    clip_norm: float = 0.0
    """Largest global norm of the gradient; 0: no clipping."""
    decay_rate: float = 0.8
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_choice("optimizer.name", self.name, ["adafactor", "adamw"])
        check_choice("optimizer.schedule", self.schedule, ["rsqrt", "cosine", "constant"])
        _check_positive("optimizer", {"learning_rate": self.learning_rate})
        _check_fraction("optimizer", {"b1": self.b1, "b2": self.b2, "decay_rate": self.decay_rate})
        for name in ("warmup_steps", "clip_norm", "weight_decay"):
            _require(getattr(self, name) >= 0, f"optimizer.{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run and what it writes."""

    steps: int = 100_000
    seed: int = 0
    accumulation_steps: int = 1
    """Micro-batches a step; but for noise, which each draws anew, gradients equal those of the undivided batch."""
    z_loss_weight: float = 1e-4
    log_every: int = 10
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3

    def __post_init__(self) -> None:
        sizes = ("steps", "accumulation_steps", "log_every", "checkpoint_every", "keep_checkpoints")
        _check_positive("train", {name: getattr(self, name) for name in sizes})
        _require(self.z_loss_weight >= 0, f"train.z_loss_weight must not be negative, got {self.z_loss_weight}")


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out evaluation during and after training."""

    every: int = 1000
    """Steps between evaluations; 0: only at the end."""
    batches: int = 16
    """Batches a corpus; 0: the whole split."""
    split: str = "validation"

    def __post_init__(self) -> None:
        _require(self.every >= 0, f"evaluate.every must not be negative, got {self.every}")
        _require(self.batches >= 0, f"evaluate.batches must not be negative, got {self.batches}")
        check_choice("evaluate.split", self.split, ["train", "validation", "test"])


@dataclass(frozen=True)
class InitFromConfig:
    """Where a new run takes its weights from; an empty `workdir` means random initialisation."""

    workdir: str = ""
    step: int = -1
    """Checkpoint of that workdir; -1: the latest."""


@dataclass(frozen=True)
class Config:
    """Everything a run depends on; `config.json` in its workdir holds it whole."""

    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    init_from: InitFromConfig = field(default_factory=InitFromConfig)

    def __post_init__(self) -> None:
        rows, steps = self.data.batch_size, self.train.accumulation_steps
        _require(
            rows % steps == 0,
            f"data.batch_size={rows} is not a multiple of train.accumulation_steps={steps}",
        )
        pieces = self.data.vocabulary_size + self.data.num_sentinels
        _require(
            bool(self.data.vocabulary) or pieces <= self.model.vocab_size,
            f"model.vocab_size={self.model.vocab_size} holds less than data.vocabulary_size + num_sentinels = {pieces}",
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """Builds and checks a config; sections and keys that are left out take their defaults.

        Raises:
            UserError: for an unknown key (with a suggestion), a wrong type or a value out of range.
        """
        return _build(cls, values, "")

    @classmethod
    def from_json(cls, text: str | bytes) -> "Config":
        """The inverse of `to_json`.

        Raises:
            UserError: if `text` is no JSON object or does not describe a config.
        """
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"the config is not valid JSON: {error}") from None
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Sections of plain values."""
        return dataclasses.asdict(self)

    def to_config_dict(self) -> ConfigDict:
        """A locked `ConfigDict`, as files in `configs/` return it."""
        return ConfigDict(self.to_dict()).lock()

    def to_json(self) -> str:
        """The resolved config as indented JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


def check_key(key: str) -> None:
    """Raises a `UserError` with a suggestion unless `key` is a `section.key` of `Config`."""
    section, _, name = key.partition(".")
    sections = typing.get_type_hints(Config)
    _require(section in sections, f"unknown config key '{section}'{suggest(section, sections)}")
    names = [entry.name for entry in dataclasses.fields(sections[section])]
    _require(name in names, f"unknown config key '{key}'{suggest(name, names)}")


def _build(cls: type, values: Any, path: str) -> Any:
    _require(isinstance(values, Mapping | ConfigDict), f"{path or 'config'} must hold keys and values, got {values!r}")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        key = f"{path}.{name}" if path else str(name)
        _require(name in hints, f"unknown config key '{key}'{suggest(str(name), hints)}")
        hint = hints[name]
        arguments[name] = _convert(hint, value, key)
    return cls(**arguments)


def _convert(hint: Any, value: Any, key: str) -> Any:
    """`value` as the annotated type; only int -> float and list -> tuple are converted."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build(hint, value, key)
    if isinstance(hint, types.GenericAlias):
        _require(isinstance(value, list | tuple), f"{key} must be a tuple, got {value!r}")
        return tuple(_convert(hint.__args__[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    _require(type(value) is hint, f"{key} must be of type {hint.__name__}, got {value!r}")
    _require(hint is not float or math.isfinite(value), f"{key} must be finite, got {value}")
    return value


def differences(old: Config, new: Config) -> dict[str, str]:
    """`section.key` -> `old -> new`, for every key that differs."""
    changes: dict[str, str] = {}
    for section, was in old.to_dict().items():
        now = new.to_dict()[section]
        changes |= {f"{section}.{key}": f"{was[key]!r} -> {now[key]!r}" for key in was if was[key] != now[key]}
    return changes


def load_workdir_config(workdir: str | Path) -> Config:
    """The config that a run saved.

    Raises:
        UserError: if `workdir` holds no readable `config.json`.
    """
    path = Path(workdir) / "config.json"
    try:
        return Config.from_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"no run in {workdir}: cannot read {path} ({error.strerror})") from None
