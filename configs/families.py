"""A tiny MoE model of each family and its dense twin of the same FLOPs, on real data: the study in docs/families.md.

python scripts/train.py --config=configs/families.py:glam --workdir=runs/families/glam
python scripts/benchmark.py families --write docs/families.md

Sizes: glam, mixtral, pr-moe, base, lstm-moe, v-moe; their twins glam-dense, mixtral-dense, ...; runlocal.

A twin has the same layers with one feed-forward network in place of the experts. Its d_ff is chosen so that a token
costs the same number of multiplications in both (routers aside).
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from switchjax.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
    check_choice,
)

_TEXT: dict[str, Any] = {
    "model": {
        "family": "decoder_only",
        "vocab_size": 1024,
        "d_model": 48,
        "d_ff": 96,
        "num_heads": 3,
        "d_head": 16,
        "num_decoder_layers": 4,
        "scale_scores": True,
        "scan_layers": False,
    },
    "moe": {"num_experts": 8, "group_size": 512, "fill_order": "token_by_token", "jitter_noise": 0.0},
    "data": {
        "objective": "causal",
        "corpora": ("kjv", "newsgroups", "austen", "state_of_the_union"),
        "vocabulary_size": 1000,
        "num_sentinels": 0,
        "batch_size": 16,
        "decoder_length": 128,
    },
    "optimizer": {"schedule": "cosine", "learning_rate": 0.1, "warmup_steps": 40},
    "train": {"steps": 1400, "log_every": 20, "checkpoint_every": 700},
}
_GPT = {
    "norm": "layer",
    "biases": True,
    "activation": "gelu",
}
# These models are trained too briefly to learn GPT's positions.
_ROTARY_GPT = {**_GPT, "positions": "rotary"}
_TOP_2 = {"router": "top_k", "num_selected_experts": 2}
_IMAGES: dict[str, Any] = {
    "model": {
        **_GPT,
        "positions": "learned",
        "family": "vision",
        "d_model": 64,
        "d_ff": 128,
        "num_heads": 4,
        "d_head": 16,
        "num_encoder_layers": 4,
        "image_size": 28,
        "image_channels": 1,
        "patch_size": 4,
        "num_classes": 10,
        "embedding_stddev": 0.02,
        "scale_scores": True,
        "scan_layers": False,
    },
    "moe": {"num_experts": 8, "group_size": 400, "jitter_noise": 0.0},
    "data": {"objective": "classification", "corpora": ("fashion_mnist",), "batch_size": 64},
    "optimizer": {"name": "adamw", "schedule": "cosine", "learning_rate": 1e-3, "warmup_steps": 100},
    "train": {"steps": 1400, "log_every": 20, "checkpoint_every": 700},
}

# Family -> the shared sections, the shared changes of the model, the MoE model's changes, the dense twin's changes.
_FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # A dense layer (a GLU) has 3 matrices, the two experts 2 each: 3 + 2 * 2 = 7 in two layers. The twin has 2 * 3 = 6,
    # so its d_ff is 96 * 7 / 6.
    "glam": (_TEXT, {"activation": "geglu", "expert_activation": "gelu"}, {"moe": _TOP_2}, {"d_ff": 112}),
    # A token has two experts in every layer.
    "mixtral": (
        _TEXT,
        {"activation": "swiglu", "positions": "rotary", "num_kv_heads": 1, "d_ff": 48, "tie_embeddings": False},
        {"model": {"pattern": ("moe",)}, "moe": {**_TOP_2, "dropless": True}},
        {"d_ff": 96},
    ),
    # One expert and a dense network in every other layer; the second MoE layer has twice as many experts.
    "pr-moe": (
        _TEXT,
        _ROTARY_GPT,
        {"moe": {"num_shared_experts": 1, "experts_per_layer": (8, 16), "fill_order": "random"}},
        {"d_ff": 144},
    ),
    # One expert between the second and the third of 4 dense layers.
    "base": (
        _TEXT,
        _ROTARY_GPT,
        {
            "model": {"pattern": ("dense", "dense", "base", "dense", "dense"), "num_decoder_layers": 5},
            # A token's best expert always has room, as in the paper's evaluation.
            "moe": {
                "router": "base",
                "num_experts": 4,
                "eval_capacity_factor": 4.0,
                "loss_weights": {"load_balance_loss": 0.0},
            },
        },
        {"d_ff": 120},
    ),
    # Four experts between two LSTM layers, as costly as one of them. AdamW, because the router starts at zero and
    # Adafactor, whose steps are proportional to a parameter's size, would never move it.
    "lstm-moe": (
        _TEXT | {"optimizer": {**_TEXT["optimizer"], "name": "adamw", "learning_rate": 0.02, "warmup_steps": 100}},
        {
            "family": "recurrent",
            "norm": "none",
            "positions": "none",
            "num_decoder_layers": 3,
            "embedding_stddev": 0.3,
            "scale_logits": False,
        },
        {
            "model": {"pattern": ("lstm", "moe_only", "lstm")},
            "moe": {
                "router": "noisy_top_k",
                "num_selected_experts": 4,
                "num_experts": 16,
                "train_capacity_factor": 2.0,
                "eval_capacity_factor": 4.0,
                "loss_weights": {"load_balance_loss": 0.0, "importance_loss": 0.1, "load_loss": 0.1},
            },
        },
        {"pattern": ("lstm", "dense_only", "lstm"), "d_ff": 384},
    ),
    # A token has two experts in every second block.
    "v-moe": (
        _IMAGES,
        {},
        {
            "moe": {
                "router": "v_moe",
                "num_selected_experts": 2,
                "train_capacity_factor": 1.05,
                "eval_capacity_factor": 1.05,
                "fill_order": "batch_prioritized",
                "loss_weights": {"load_balance_loss": 0.0, "importance_loss": 0.005, "load_loss": 0.005},
            }
        },
        {"d_ff": 192},
    ),
}
SIZES = tuple(name + twin for name in _FAMILIES for twin in ("", "-dense"))


def get_config(arg: str = "glam") -> ConfigDict:
    """The config of a family's tiny MoE model or of its dense twin."""
    check_choice("configs/families.py", arg, [*SIZES, "runlocal"])
    name = "glam" if arg == "runlocal" else arg.removesuffix("-dense")
    base, model, moe, dense = _FAMILIES[name]
    changes = {"model": {"pattern": ("dense",)} | dense} if arg.endswith("-dense") else moe
    sections = {section: values | changes.get(section, {}) for section, values in base.items()}
    sections["model"] = base["model"] | model | changes.get("model", {})
    config = Config(
        model=ModelConfig(**sections["model"]),
        moe=MoEConfig(**sections["moe"]),
        data=DataConfig(**sections["data"]),
        optimizer=OptimizerConfig(**sections["optimizer"]),
        train=TrainConfig(**sections["train"]),
        evaluate=EvaluateConfig(every=200, batches=16),
    )
    if arg == "runlocal":
        data = dataclasses.replace(config.data, corpora=("kjv",))
        moe = dataclasses.replace(config.moe, group_size=128)  # one row per group: 16 groups divide over 16 devices
        config = dataclasses.replace(config, moe=moe, data=data, train=TrainConfig(steps=2, log_every=1))
    return config.to_config_dict()
