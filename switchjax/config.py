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
    """The layers of one period, which repeats to fill each stack: dense, moe (experts for the feed-forward network) or
    switch_attention (experts for queries, keys and values)."""
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

    @property
    def has_experts(self) -> bool:
        """Whether any layer is routed."""
        return set(self.pattern) != {"dense"}

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
            check_choice("model.pattern", kind, ["dense", "moe", "switch_attention"])
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
    """A name of `switchjax.moe.routers.ROUTERS`."""
    num_experts: int = 8
    num_selected_experts: int = 1
    """K; a hierarchical router selects K / num_selected_groups in each group of experts that it selects."""
    group_size: int = 512
    """Most tokens that compete for the same buffers (whole rows, or an even part of one); the mesh plays no part."""
    train_capacity_factor: float = 1.25
    eval_capacity_factor: float = 2.0
    min_expert_capacity: int = 4
    dropless: bool = False
    """Every expert has room for every token; the capacity factors then mean nothing."""
    dispatch: str = "gather"
    """gather, einsum (one-hot masks), or ragged (dropless, experts on one device: grouped matrix products)."""

    fill_order: str = "first_come"
    """Who gets the slots of a full expert: first_come (all first choices before any second), token_by_token (earlier
    tokens with all their choices), batch_prioritized (highest gate first) or random (in training)."""
    no_token_left_behind: int = 0
    """Rounds in which a choice that found no slot goes to the token's next best expert."""
    normalize_gates: bool = True
    """Gates of a token's K > 1 experts sum to 1 (routers top_k and sigmoid)."""
    sample_experts: bool = False
    """In training, experts are drawn from the router's distribution instead of its K best."""
    jitter_noise: float = 0.01
    """In training, the router's input is multiplied by U(1 - jitter_noise, 1 + jitter_noise)."""
    input_dropout: float = 0.0
    """In training, the rate of dropout on the router's input."""
    expert_dropout: float = 0.0
    second_expert_threshold: float = 0.2
    """st_moe: the gate that a second expert must exceed."""
    num_expert_groups: int = 1
    """hierarchical: groups that the experts are divided into."""
    num_selected_groups: int = 1
    """hierarchical: groups that a token selects."""
    bias_update_rate: float = 0.001
    """sigmoid: the step by which an expert's bias rises or falls after each train step."""
    hash_table: str = "random"
    """hash: random, balanced (by the corpora's token counts) or clustered (by the embeddings of `init_from`)."""
    sinkhorn_iterations: int = 20
    auction_rounds: int = 2000
    """base: most rounds of bidding; tokens without an expert then take what is left, in order."""
    allow_noncausal_routing: bool = False
    """Let a decoder route by what comes after a token, as expert choice and orders across tokens do."""

    num_shared_experts: int = 0
    """Experts that every token passes through beside the routed ones."""
    shared_mixing: str = "sum"
    """How their output joins: sum, or learned (a softmax of two weights a token, DeepSpeed-MoE's code)."""

    load_balance_loss_weight: float = 0.01
    router_z_loss_weight: float = 0.0
    importance_loss_weight: float = 0.0
    load_loss_weight: float = 0.0
    policy_loss_weight: float = 0.01
    """reinforced: weight of the policy gradient and of its baseline."""
    policy_entropy_loss_weight: float = 0.01

    def __post_init__(self) -> None:
        sizes = (
            "num_experts",
            "num_selected_experts",
            "group_size",
            "train_capacity_factor",
            "eval_capacity_factor",
            "min_expert_capacity",
            "num_expert_groups",
            "num_selected_groups",
            "bias_update_rate",
            "sinkhorn_iterations",
            "auction_rounds",
        )
        _check_positive("moe", {name: getattr(self, name) for name in sizes})
        fractions = ("jitter_noise", "input_dropout", "expert_dropout", "second_expert_threshold")
        _check_fraction("moe", {name: getattr(self, name) for name in fractions})
        check_choice("moe.dispatch", self.dispatch, ["gather", "einsum", "ragged"])
        orders = ["first_come", "token_by_token", "batch_prioritized", "random"]
        check_choice("moe.fill_order", self.fill_order, orders)
        check_choice("moe.hash_table", self.hash_table, ["random", "balanced", "clustered"])
        check_choice("moe.shared_mixing", self.shared_mixing, ["sum", "learned"])
        _require(
            self.num_selected_experts <= self.num_experts,
            f"moe.num_selected_experts={self.num_selected_experts} exceeds moe.num_experts={self.num_experts}",
        )
        _require(
            self.dispatch != "ragged" or self.dropless,
            "moe.dispatch=ragged drops no token: it needs moe.dropless=True",
        )
        _require(
            self.dispatch != "ragged" or self.expert_dropout == 0,
            "moe.dispatch=ragged has no expert dropout: set moe.expert_dropout=0",
        )
        for name in (
            "load_balance_loss_weight",
            "router_z_loss_weight",
            "importance_loss_weight",
            "load_loss_weight",
            "policy_loss_weight",
            "policy_entropy_loss_weight",
            "no_token_left_behind",
            "num_shared_experts",
        ):
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
