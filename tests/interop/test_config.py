"""config.json: the values that reach our config, and those that are refused by name."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from switchjax.config import Config, UserError
from switchjax.interop.config import write_config
from switchjax.interop.convert import config_of
from tests.interop.examples import FIXTURES, MODELS, SHAPES, random_folder
from tests.models.families import FAMILIES


def changed(name: str, folder: Path, **changes: Any) -> Config:
    """The config of a folder of `SHAPES` with a changed config.json; None removes a key."""
    random_folder(name, folder)
    values = SHAPES[name]["config"] | changes
    (folder / "config.json").write_text(json.dumps({key: v for key, v in values.items() if v is not None}))
    return config_of(folder)


@pytest.mark.parametrize("name", MODELS)
def test_a_config_survives_the_way_there_and_back(name: str, tmp_path: Path) -> None:
    config = config_of(FIXTURES / name)
    for file in ("model.safetensors",):
        (tmp_path / file).symlink_to(FIXTURES / name / file)
    (tmp_path / "config.json").write_text(json.dumps(write_config(config)))
    assert config_of(tmp_path) == config


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_what_transformers_wrote(name: str) -> None:
    theirs = json.loads((FIXTURES / name / "config.json").read_text())
    ours = write_config(config_of(FIXTURES / name))
    # T5's own says that embeddings are tied whatever they are.
    differing = {key for key in theirs.keys() & ours.keys() if theirs[key] != ours[key]} - {"tie_word_embeddings"}
    assert differing <= ({"head_dim"} if name == "mixtral" else set())  # null is the same


def test_no_key_of_transformers_is_unknown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for name in MODELS:
            config_of(FIXTURES / name)
    assert not caplog.records


def test_an_unknown_key_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changed("vit_deep", tmp_path, surprise=3)
    assert "ignoring unknown keys: surprise" in caplog.text


def test_keys_left_out_take_the_values_of_transformers(tmp_path: Path) -> None:
    config = changed("t5_gated_silu", tmp_path, num_heads=None, relative_attention_max_distance=None, d_kv=None)
    assert (config.model.num_heads, config.model.d_head, config.model.relative_max_distance) == (8, 64, 128)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("t5_gated_silu", {"feed_forward_proj": "gated-relu"}, r"feed_forward_proj='gated-relu' is not supported"),
        ("t5_gated_silu", {"model_type": "t6"}, r"unknown value 't6' \(known: t5,"),
        (
            "t5_gated_silu",
            {"architectures": ["T5EncoderModel"]},
            r"architectures=\['T5EncoderModel'\] is not supported",
        ),
        ("t5_gated_silu", {"d_model": "wide"}, r"model.d_model must be of type int, got 'wide'"),
        ("switch_step_1", {"encoder_sparse_step": "2"}, r"a value has the wrong type, or is 0"),
        ("mixtral_tied", {"rope_parameters": 3}, r"a value has the wrong type, or is 0"),
        ("vit_deep", {"num_attention_heads": 0}, r"a value has the wrong type, or is 0"),
        ("switch_step_1", {"router_bias": True}, r"router_bias=True is not supported, only False"),
        ("switch_step_1", {"router_dtype": "bfloat16"}, r"router_dtype='bfloat16' is not supported, only 'float32'"),
        ("switch_step_1", {"dense_act_fn": "silu"}, r"dense_act_fn='silu' is not supported"),
        ("switch_step_2", {"decoder_sparse_step": 1}, r"no one model.pattern gives .* of both stacks: dmdm and mm"),
        ("mixtral_tied", {"num_experts_per_tok": 1}, r"num_experts_per_tok=1 is not supported"),
        ("mixtral_tied", {"rope_parameters": {"rope_type": "yarn"}}, r"rope_type='yarn' is not supported"),
        ("mixtral_tied", {"attention_dropout": 0.1}, r"attention_dropout=0.1 is not supported, only 0.0"),
        ("vit_deep", {"qkv_bias": False}, r"qkv_bias=False is not supported, only True"),
        ("vit_deep", {"hidden_dropout_prob": 0.1}, r"attention_probs_dropout_prob must equal hidden_dropout_prob"),
    ],
)
def test_what_the_models_here_lack_is_refused_by_name(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        changed(name, tmp_path, **changes)


def test_images_that_are_scaled_otherwise_are_refused(tmp_path: Path) -> None:
    changed("vit_deep", tmp_path)
    processor = tmp_path / "preprocessor_config.json"
    processor.write_text(json.dumps({"image_mean": [0.5, 0.5], "image_std": [0.5, 0.5], "do_resize": True}))
    config_of(tmp_path)
    processor.write_text(json.dumps({"image_mean": [0.485, 0.456]}))
    with pytest.raises(UserError, match=r"image_mean=\[0.485, 0.456\] is not supported, only 0.5: switchjax scales"):
        config_of(tmp_path)
    processor.write_text(json.dumps({"image_mean": 0.485}))
    with pytest.raises(UserError, match=r"image_mean=0.485 is not supported, only 0.5: switchjax scales"):
        config_of(tmp_path)
    processor.write_text(json.dumps({"image_mean": 0.5}))
    config_of(tmp_path)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gpt", r"MixtralForCausalLM does not support model.pattern=\('dense', 'moe'\), only \('moe',\)"),
        ("lstm", r"transformers has no model like model.family=recurrent"),
        ("v_moe", r"ViTForImageClassification does not support model.pattern"),
        ("mixtral", r"MixtralForCausalLM does not support moe.dropless=False, only True"),
    ],
)
def test_what_transformers_lacks_is_refused_by_name(family: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_config(FAMILIES[family])


@pytest.mark.parametrize("name", ["t5_v1_1", "switch", "vit", "mixtral"])
def test_what_would_change_what_their_model_computes_is_refused(name: str) -> None:
    config = config_of(FIXTURES / name)
    other = "relu" if config.model.activation != "relu" else "gelu"
    same = {"num_kv_heads": config.model.kv_heads, "expert_activation": config.model.activation}
    assert write_config(with_model(config, **same)) == write_config(config)
    for key, value in {"num_kv_heads": 1, "sliding_window": 3, "expert_activation": other}.items():
        if name == "mixtral" and key != "expert_activation":
            continue  # it has them
        if not config.model.has_experts and key == "expert_activation":
            continue  # of none
        with pytest.raises(UserError, match=rf"does not support model\.{key}={value!r}"):
            write_config(with_model(config, **{key: value}))


def with_model(config: Config, **changes: Any) -> Config:
    return replace(config, model=replace(config.model, **changes))


def test_a_pattern_may_repeat_itself() -> None:
    once = config_of(FIXTURES / "t5_v1_1")
    twice = replace(once, model=replace(once.model, pattern=once.model.pattern * 2))
    assert write_config(twice) == write_config(once)


def test_weights_of_the_routers_losses_count_stacks_and_experts_of_a_token(tmp_path: Path) -> None:
    moe = changed("switch_step_2", tmp_path / "switch", router_aux_loss_coef=0.01, router_z_loss_coef=0.002).moe
    assert moe.loss_weights == {"load_balance_loss": 0.02, "router_z_loss": 0.004}
    moe = changed("mixtral_tied", tmp_path / "mixtral", router_aux_loss_coef=0.01).moe
    assert moe.loss_weights == {"load_balance_loss": 0.02}


def test_capacity_is_a_number_of_slots_a_row(tmp_path: Path) -> None:
    moe = changed("switch_step_2", tmp_path, expert_capacity=7).moe
    assert (moe.expert_capacity, moe.group_size) == (7, 0)


@pytest.mark.parametrize("content", ["", "[]", None])
def test_a_config_that_cannot_be_read_is_refused(tmp_path: Path, content: str | None) -> None:
    random_folder("vit_deep", tmp_path)
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config.json"):
        config_of(tmp_path)
