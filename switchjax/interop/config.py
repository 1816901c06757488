"""Translates between Hugging Face's config.json and our config: fixed, renamed and computed values.

A feature that only one side has is refused, with an error that names it.
"""

import json
import logging
import operator
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from switchjax.config import Config, ModelConfig, UserError
from switchjax.interop.families import HUGGINGFACE_FAMILIES, family_of, model_type_of
from switchjax.interop.family import Values
from switchjax.interop.patterns import find_pattern
from switchjax.interop.tensors import DTYPES, TensorFolder
from switchjax.interop.tokenizer import vocabulary_sizes
from switchjax.moe.routers import router_options

_log = logging.getLogger(__name__)

_FREE = frozenset(
    {
        "_name_or_path",
        "add_cross_attention",
        "add_router_probs",
        "architectures",
        "bos_token_id",
        "classifier_dropout",
        "decoder_start_token_id",
        "dense_act_fn",
        "dtype",
        "encoder_stride",
        "eos_token_id",
        "feed_forward_proj",
        "initializer_factor",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "is_gated_act",
        "label2id",
        "model_type",
        "n_positions",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "output_router_logits",
        "pad_token_id",
        "pooler_act",
        "pooler_output_size",
        "problem_type",
        "return_dict",
        "router_ignore_padding_tokens",
        "task_specific_params",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Keys of config.json that do not change what a model computes from its inputs, or that follow from other keys."""


class _Watched(Mapping[str, Any]):
    """A mapping that records which keys were read, so that unknown keys can be reported."""

    def __init__(self, values: Values):
        self._values = values
        self.seen: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def read_config(folder: Path, source: TensorFolder) -> Config:
    """Reads the config of a model from a folder with config.json and perhaps a tokenizer.

    The files decide the model (in part by names and types of the tensors in `source`) and the vocabulary's size;
    everything else has its default.

    Raises:
        UserError: names what cannot be read, is unsupported or unknown.
    """
    _check_processor(folder / "preprocessor_config.json")
    theirs = _Watched(read_json(folder / "config.json"))
    family = family_of(theirs)
    for key, wanted in family.theirs.items():
        if theirs.get(key, wanted) != wanted:
            raise UserError(f"config.json: {key}={theirs[key]!r} is not supported, only {wanted!r}")
    values = {key.ours: theirs.get(key.theirs, key.default) for key in family.keys}
    try:
        values = {**family.ours, **values, **family.read(theirs, source.names)}
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"config.json: a value has the wrong type, or is 0: {error}") from None
    if ignored := sorted(set(theirs) - theirs.seen - _FREE):
        _log.warning("config.json: ignoring unknown keys: %s", ", ".join(ignored))
    dtype = _common_dtype(source)
    values |= {"model.dtype": dtype, "model.param_dtype": dtype}
    if "model.vocab_size" in values:
        values |= vocabulary_sizes(folder, values["model.vocab_size"])
    return _config(values)


def write_config(config: Config) -> Values:
    """The content of config.json for a model.

    Raises:
        UserError: names the feature that transformers' model lacks.
    """
    kind = model_type_of(config)
    family = HUGGINGFACE_FAMILIES[kind]
    config = replace(config, model=_simplest(config.model))
    for key, wanted in family.ours.items():
        if (value := _get(config, key)) != wanted:
            raise UserError(f"{family.architecture} does not support {key}={value!r}, only {wanted!r}")
    same = {key.theirs: _get(config, key.ours) for key in family.keys}
    about = {"architectures": [family.architecture], "model_type": kind, "dtype": config.model.param_dtype}
    return {**about, **family.theirs, **same, **family.write(config)}


def _simplest(model: ModelConfig) -> ModelConfig:
    """The same model in its simplest form; for instance, the pattern (dense, dense) becomes (dense)."""
    return replace(
        model,
        pattern=find_pattern([model.pattern]),
        num_kv_heads=0 if model.kv_heads == model.num_heads else model.num_kv_heads,
        expert_activation="" if model.experts_activation == model.activation else model.expert_activation,
    )


def read_json(path: Path) -> Values:
    """Reads a JSON object from a file.

    Raises:
        UserError: if the file is missing or holds something else.
    """
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return values


def _check_processor(path: Path) -> None:
    """Raises a `UserError` if the image processor scales images to another range than [-1, 1]."""
    settings = read_json(path) if path.exists() else {}
    for key in ("image_mean", "image_std"):
        values = settings.get(key) or []
        if any(value != 0.5 for value in (values if isinstance(values, list) else [values])):
            raise UserError(
                f"{path.name}: {key}={settings[key]} is not supported, only 0.5: switchjax scales images to [-1, 1]"
            )


def _common_dtype(source: TensorFolder) -> str:
    """bfloat16 if all tensors are bfloat16, else float32, which holds both types exactly."""
    dtypes = {source.dtype(name): name for name in sorted(source.names)}
    if other := set(dtypes) - set(DTYPES):
        dtype = min(other)
        raise UserError(f"tensor {dtypes[dtype]} is {dtype}; only {' and '.join(DTYPES)} are read")
    return DTYPES["BF16" if set(dtypes) == {"BF16"} else "F32"]


def _config(values: Values) -> Config:
    sections: Values = {}
    for key, value in values.items():
        *path, name = key.split(".")
        section = sections
        for part in path:
            section = section.setdefault(part, {})
        section[name] = value
    return Config.from_dict(sections)


def _get(config: Config, key: str) -> Any:
    if key.startswith("moe.options."):
        return getattr(router_options(config.moe), key.removeprefix("moe.options."))
    return operator.attrgetter(key)(config)
