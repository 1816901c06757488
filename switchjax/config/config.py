"""The whole configuration, and its conversion to and from `ml_collections`, dictionaries and JSON."""

import dataclasses
import itertools
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from switchjax.config.checks import UserError, check_choice, require, suggest
from switchjax.config.data import DataConfig
from switchjax.config.formats import FORMAT, migrate
from switchjax.config.layers import KINDS, Layer
from switchjax.config.model import ModelConfig
from switchjax.config.moe import MoEConfig
from switchjax.config.run import EvaluateConfig, InitFromConfig, MeshConfig, OptimizerConfig, TrainConfig

OPEN_KEYS = ("moe.options.", "moe.loss_weights.")
"""Keys below these belong to a router, which checks them."""

_OBJECTIVES = {
    "encoder_decoder": "span_corruption",
    "decoder_only": "causal",
    "recurrent": "causal",
    "vision": "classification",
}


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on; `config.json` in its workdir holds all of it."""

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
        require(rows % steps == 0, f"data.batch_size={rows} is not a multiple of train.accumulation_steps={steps}")
        self._check_objective()
        require(
            self.moe.dispatch != "ragged" or not self.model.biases,
            "moe.dispatch=ragged has grouped products and no biases: set model.biases=False or moe.dispatch=gather",
        )
        pieces = self.data.vocabulary_size + self.data.num_sentinels
        require(
            bool(self.data.vocabulary) or self.model.family == "vision" or pieces <= self.model.vocab_size,
            f"model.vocab_size={self.model.vocab_size} holds less than data.vocabulary_size + num_sentinels = {pieces}",
        )

    def _check_objective(self) -> None:
        objective = _OBJECTIVES[self.model.family]
        require(
            self.data.objective == objective,
            f"a model of model.family={self.model.family} needs data.objective={objective}, got {self.data.objective}",
        )
        length = self.stack_lengths.get("decoder", 0)
        require(
            self.model.positions != "learned" or self.model.family == "vision" or length <= self.model.max_length,
            f"data.decoder_length={length} exceeds the model.max_length={self.model.max_length} learned positions",
        )
        counts = self.moe.experts_per_layer
        for stack, layers in self.model.stacks.items() if counts else ():
            routed = layers // len(self.model.pattern) * sum(kind.has_experts for kind in self.model.kinds)
            require(
                len(counts) == routed,
                f"moe.experts_per_layer has {len(counts)} counts for the {routed} routed layers of the {stack}",
            )

    @property
    def stack_lengths(self) -> dict[str, int]:
        """Number of tokens in a row of each stack; in a vision model, patches and the class token."""
        if self.model.family == "vision":
            return {"encoder": self.model.num_patches + 1}
        lengths = {"encoder": self.data.encoder_length, "decoder": self.data.decoder_length}
        return {stack: lengths[stack] for stack in self.model.stacks}

    @property
    def rows_per_group(self) -> int:
        """Rows that must stay together in micro-batches and on shards, so that no routing group is divided."""
        if not self.model.routes_groups:
            return 1
        rows = self.data.batch_size // self.train.accumulation_steps
        tokens = ((self.moe.tokens_per_group(rows, length), length) for length in self.stack_lengths.values())
        return math.lcm(*(max(1, size // length) for size, length in tokens))

    def layers(self, stack: str) -> tuple[Layer, ...]:
        """The layers of a stack, in order."""
        kinds = self.model.pattern * (self.model.stacks[stack] // len(self.model.pattern))
        counts = iter(self.moe.experts_per_layer or itertools.repeat(self.moe.num_experts))
        return tuple(Layer(kind, next(counts) if KINDS[kind].has_experts else 0) for kind in kinds)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """The checked config of these values, by `from_mapping`; missing sections and keys have their defaults."""
        return from_mapping(cls, values, "")

    @classmethod
    def from_json(cls, text: str | bytes) -> "Config":
        """The inverse of `to_json`; raises a `UserError` if `text` is not a JSON object or not a config."""
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"the config is not valid JSON: {error}") from None
        require(isinstance(values, dict), f"config must hold keys and values, got {values!r}")
        return cls.from_saved(values)

    @classmethod
    def from_saved(cls, values: Mapping[str, Any]) -> "Config":
        """The inverse of `to_saved`, also for older formats; raises a `UserError` for an unknown format."""
        return cls.from_dict(migrate(values))

    def to_saved(self) -> dict[str, Any]:
        """The content of config.json and checkpoints: the format number, and sections of plain values."""
        return {"format": FORMAT, **self.to_dict()}

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Sections of plain values."""
        return dataclasses.asdict(self)

    def to_config_dict(self) -> ConfigDict:
        """A locked `ConfigDict`, which files in `configs/` return."""
        return ConfigDict(self.to_dict()).lock()

    def to_json(self) -> str:
        """The resolved config as indented JSON."""
        return json.dumps(self.to_saved(), indent=2) + "\n"


def check_key(key: str) -> None:
    """Raises a `UserError` with a suggestion unless `key` is a `section.key` of `Config`."""
    section, _, name = key.partition(".")
    sections = typing.get_type_hints(Config)
    require(section in sections, f"unknown config key '{section}'{suggest(section, sections)}")
    names = [entry.name for entry in dataclasses.fields(sections[section])]
    known = name in names or key.startswith(OPEN_KEYS)
    require(known, f"unknown config key '{key}'{suggest(name, names)}")


def from_mapping(cls: type, values: Any, path: str) -> Any:
    """An instance of the dataclass `cls` with these values; messages call it `path`.

    Raises:
        UserError: for an unknown key (with a suggestion), a wrong type or a value out of range.
    """
    require(isinstance(values, Mapping | ConfigDict), f"{path or 'config'} must hold keys and values, got {values!r}")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        key = f"{path}.{name}" if path else str(name)
        require(name in hints, f"unknown config key '{key}'{suggest(str(name), hints)}")
        arguments[name] = _convert(hints[name], value, key)
    return cls(**arguments)


def _convert(hint: Any, value: Any, key: str) -> Any:
    """`value` as the annotated type; only int -> float and list -> tuple are converted."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_mapping(hint, value, key)
    if typing.get_origin(hint) is Mapping:
        require(isinstance(value, Mapping | ConfigDict), f"{key} must hold keys and values, got {value!r}")
        of_values = typing.get_args(hint)[1]
        return {name: _convert(of_values, item, f"{key}.{name}") for name, item in value.items()}
    if hint is Any:
        return value
    if isinstance(hint, types.GenericAlias):
        require(isinstance(value, list | tuple), f"{key} must be a tuple, got {value!r}")
        return tuple(_convert(hint.__args__[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if typing.get_origin(hint) is Literal:
        require(type(value) is str, f"{key} must be of type str, got {value!r}")
        check_choice(key, value, typing.get_args(hint))
        return value
    require(type(value) is hint, f"{key} must be of type {hint.__name__}, got {value!r}")
    require(hint is not float or math.isfinite(value), f"{key} must be finite, got {value}")
    return value


def differences(old: Config, new: Config) -> dict[str, str]:
    """`section.key` -> `old -> new`, for each key whose value differs."""
    changes: dict[str, str] = {}
    for section, was in old.to_dict().items():
        now = new.to_dict()[section]
        changes |= {f"{section}.{key}": f"{was[key]!r} -> {now[key]!r}" for key in was if was[key] != now[key]}
    return changes


def load_workdir_config(workdir: str | Path) -> Config:
    """The config that a run saved; raises a `UserError` if `workdir` has no readable `config.json`."""
    path = Path(workdir) / "config.json"
    try:
        return Config.from_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"no run in {workdir}: cannot read {path} ({error.strerror})") from None
