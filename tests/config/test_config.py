"""Configs round-trip, and errors in a config are refused with a message that names the key."""

import dataclasses
import json
import re
import typing
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from switchjax.config import (
    Config,
    DecodingConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    UserError,
    check_choice,
    differences,
    load_workdir_config,
    suggest,
)

UNUSUAL = Config.from_dict(
    {
        "model": {"pattern": ["moe"], "num_encoder_layers": 3, "num_decoder_layers": 5, "remat": "dots"},
        "moe": {"num_experts": 3, "train_capacity_factor": 0.1},
        "data": {"corpora": ["a", "b"], "rates": [0.25, 1], "batch_size": 12},
        "train": {"accumulation_steps": 3, "z_loss_weight": 1e-17},
    }
)


@pytest.mark.parametrize("config", [Config(), UNUSUAL])
def test_dict_config_dict_and_json_round_trip(config: Config) -> None:
    assert Config.from_dict(config.to_dict()) == config
    assert Config.from_dict(config.to_config_dict()) == config
    assert Config.from_json(config.to_json()) == config


def test_sections_and_keys_left_out_take_their_defaults() -> None:
    assert Config.from_dict({}) == Config()
    assert Config.from_dict({"moe": {"num_experts": 4}}) == Config(moe=MoEConfig(num_experts=4))


def test_lists_become_tuples_and_whole_numbers_floats() -> None:
    assert UNUSUAL.model.pattern == ("moe",)
    assert UNUSUAL.data.rates == (0.25, 1.0)
    assert type(UNUSUAL.data.rates[1]) is float
    assert type(Config.from_dict({"optimizer": {"learning_rate": 1}}).optimizer.learning_rate) is float


@pytest.mark.parametrize("section", [entry.name for entry in dataclasses.fields(Config)])
def test_every_section_is_frozen_and_described(section: str) -> None:
    values = getattr(Config(), section)
    assert type(values).__doc__
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(values, dataclasses.fields(values)[0].name, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "unknown config key 'modle' (did you mean 'model'?)"),
        ({"moe": {"num_expert": 8}}, "unknown config key 'moe.num_expert' (did you mean 'num_experts'?)"),
        ({"mesh": {"zzz": 8}}, "unknown config key 'mesh.zzz' (known: data, expert, model, sharded, emulated_devices)"),
        ({"moe": 3}, "moe must hold keys and values, got 3"),
        ({"moe": {"num_experts": 8.0}}, "moe.num_experts must be of type int, got 8.0"),
        ({"moe": {"num_experts": True}}, "moe.num_experts must be of type int, got True"),
        ({"moe": {"num_experts": None}}, "moe.num_experts must be of type int, got None"),
        ({"model": {"tie_embeddings": 1}}, "model.tie_embeddings must be of type bool, got 1"),
        ({"model": {"dropout": "0.1"}}, "model.dropout must be of type float, got '0.1'"),
        ({"model": {"pattern": "moe"}}, "model.pattern must be a tuple, got 'moe'"),
        ({"data": {"rates": [1, "2"]}}, "data.rates[1] must be of type float, got '2'"),
        ({"model": {"activation": "swigl"}}, "model.activation: unknown value 'swigl' (did you mean 'swiglu'?)"),
        ({"model": {"norm": 3}}, "model.norm must be of type str, got 3"),
        ({"model": {"expert_activation": "tanh"}}, "model.expert_activation: unknown value 'tanh' (known: relu, gelu,"),
        ({"moe": {"dispatch": "gathr"}}, "moe.dispatch: unknown value 'gathr' (did you mean 'gather'?)"),
    ],
)
def test_unknown_keys_and_wrong_types_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match="^" + re.escape(message)):
        Config.from_dict(values)


INFINITE, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "d_model", 0),
        ("model", "num_decoder_layers", -2),
        ("model", "dropout", 1.0),
        ("model", "dropout", NAN),
        ("model", "family", "decoder"),
        ("model", "dtype", "float16"),
        ("model", "pattern", ()),
        ("model", "pattern", ("dense", "sparse")),
        ("model", "num_encoder_layers", 3),  # not a multiple of the pattern's 2
        ("model", "relative_buckets", 2),
        ("model", "relative_buckets", 31),
        ("model", "relative_max_distance", 16),
        ("moe", "num_experts", 0),
        ("moe", "group_size", -1),
        ("moe", "expert_capacity", -1),
        ("moe", "train_capacity_factor", 0.0),
        ("moe", "eval_capacity_factor", -1.0),
        ("moe", "eval_capacity_factor", INFINITE),
        ("moe", "min_expert_capacity", 0),
        ("moe", "jitter_noise", 1.0),
        ("moe", "expert_dropout", -0.1),
        ("moe", "loss_weights", {"load_balance_loss": -1e-2}),
        ("moe", "loss_weights", {"router_z_loss": NAN}),
        ("moe", "loss_weights", 0.1),
        ("moe", "dispatch", "scatter"),
        ("mesh", "data", 0),
        ("mesh", "data", -2),
        ("mesh", "expert", 0),
        ("mesh", "emulated_devices", -1),
        ("data", "batch_size", 0),
        ("data", "corpora", ()),
        ("data", "corpora", ("a", "a")),
        ("data", "rates", (0.5, 0.5)),
        ("data", "rates", (0.0,)),
        ("data", "noise_density", 1.0),
        ("data", "mean_span_length", 0.5),
        ("optimizer", "learning_rate", 0.0),
        ("optimizer", "learning_rate", INFINITE),
        ("optimizer", "schedule", "parabola"),
        ("optimizer", "b2", 1.0),
        ("optimizer", "clip_norm", -1.0),
        ("train", "steps", 0),
        ("train", "seed", -1),
        ("train", "seed", 2**32),
        ("train", "seed", 2**64),
        ("train", "z_loss_weight", -1.0),
        ("train", "step_timeout", -1),
        ("train", "heartbeat_timeout", 0),
        ("evaluate", "split", "dev"),
        ("evaluate", "batches", -1),
    ],
)
def test_values_out_of_range_are_refused_by_name(section: str, key: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"{section}\.{key}"):
        Config.from_dict({section: {key: value}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": {"batch_size": 10}, "train": {"accumulation_steps": 4}}, "data.batch_size=10 is not a multiple"),
        ({"model": {"vocab_size": 2000}}, "model.vocab_size=2000 holds less"),
    ],
)
def test_sections_that_contradict_each_other_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config.from_dict(values)


def test_a_vocabulary_file_has_its_own_size() -> None:
    Config.from_dict({"model": {"vocab_size": 2000}, "data": {"vocabulary": "some.model"}})


def test_overrides_reach_the_config_and_a_locked_one_refuses_new_keys() -> None:
    values = Config().to_config_dict()
    values.moe.num_experts = 16
    values.model.pattern = ("moe",)
    config = Config.from_dict(values)
    assert config.moe.num_experts == 16
    assert config.model.pattern == ("moe",)
    with pytest.raises(AttributeError, match="num_expert"):
        values.moe.num_expert = 4
    with pytest.raises(TypeError):
        values.moe.num_experts = "many"


def test_from_dict_leaves_its_argument_alone() -> None:
    values = ConfigDict({"data": {"rates": [1]}})
    before = values.to_json()
    Config.from_dict(values)
    assert values.to_json() == before


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"moe": []}'])
def test_json_that_describes_no_config_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        Config.from_json(text)


def test_json_is_plain_and_has_every_key() -> None:
    values = json.loads(Config().to_json())
    assert values == {"format": 1, **json.loads(json.dumps(Config().to_dict()))}
    assert set(values["mesh"]) == {entry.name for entry in dataclasses.fields(MeshConfig)}


def test_differences_name_keys_and_both_values() -> None:
    other = dataclasses.replace(Config(), moe=MoEConfig(num_experts=4), mesh=MeshConfig(expert=2))
    assert differences(Config(), other) == {"moe.num_experts": "8 -> 4", "mesh.expert": "1 -> 2"}
    assert differences(other, other) == {}


def test_a_workdir_gives_its_config_back(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(UNUSUAL.to_json())
    assert load_workdir_config(tmp_path) == UNUSUAL


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b'{"moe": {"x": 1}}'])
def test_a_workdir_without_a_readable_config_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError):
        load_workdir_config(tmp_path)


def test_suggestions_name_the_closest_or_all() -> None:
    assert suggest("adafactr", ["adafactor", "adamw"]) == " (did you mean 'adafactor'?)"
    assert suggest("sgd", ["adafactor", "adamw"]) == " (known: adafactor, adamw)"
    check_choice("optimizer.name", "adamw", ["adafactor", "adamw"])


SECTIONS = {**typing.get_type_hints(Config), "decoding": DecodingConfig}
CHOICES = [
    (section, name)
    for section, cls in SECTIONS.items()
    for name, hint in typing.get_type_hints(cls).items()
    if typing.get_origin(hint) is typing.Literal
]


@pytest.mark.parametrize(("section", "name"), CHOICES)
def test_a_value_that_is_no_choice_is_refused_in_python_too(section: str, name: str) -> None:
    with pytest.raises(UserError, match=rf"^{section}\.{name}: unknown value 'neither' \("):
        SECTIONS[section](**{name: "neither"})


def test_the_defaults_are_switch_base() -> None:
    assert ModelConfig().pattern == ("dense", "moe")
    assert (MoEConfig().train_capacity_factor, MoEConfig().eval_capacity_factor) == (1.25, 2.0)


@pytest.mark.parametrize(
    ("group_size", "rows", "length", "size"),
    [
        (512, 8, 512, 512),  # a row is a group
        (512, 8, 114, 456),  # 4 whole rows
        (512, 6, 114, 342),  # 4 would not divide 6 rows, 3 do
        (512, 7, 114, 114),  # no more than one divides 7
        (512, 2, 114, 228),  # all rows there are
        (128, 8, 512, 128),  # a part of a row
        (0, 8, 114, 114),  # each row by itself
    ],
)
def test_a_group_is_whole_rows_or_an_even_part_of_one(group_size: int, rows: int, length: int, size: int) -> None:
    assert MoEConfig(group_size=group_size).tokens_per_group(rows, length) == size
    assert rows * length % size == 0


def test_a_group_that_cuts_rows_unevenly_is_refused() -> None:
    with pytest.raises(UserError, match=r"group_size=100 neither divides a row of 512 tokens nor holds one"):
        MoEConfig(group_size=100).tokens_per_group(8, 512)
