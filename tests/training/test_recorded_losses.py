"""Ten steps of every family and kind of router, on a mesh of 8, give the recorded losses.

A change that should not alter numbers keeps them to the bit. After a change that should,
`python -m tests.training.test_recorded_losses` records them again.
"""

import hashlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from switchjax.config import Config
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import place_batch
from switchjax.training.state import plan_state
from switchjax.training.step import lower_train_step
from tests.models import examples, families

RECORDED = Path(__file__).parent / "fixtures" / "losses.json"
STEPS = 10

_SIZES = {"vocab_size": 48, "d_model": 16, "d_ff": 32, "num_heads": 4, "d_head": 4}
_T5 = {**_SIZES, "num_encoder_layers": 2, "num_decoder_layers": 2, "relative_buckets": 8, "relative_max_distance": 16}
_GPT = {
    **_SIZES,
    "family": "decoder_only",
    "num_decoder_layers": 2,
    "norm": "layer",
    "biases": True,
    "positions": "rotary",
    "activation": "gelu",
    "scale_scores": True,
}
_VIT = {
    **_GPT,
    "family": "vision",
    "num_encoder_layers": 2,
    "positions": "learned",
    "image_size": 8,
    "patch_size": 4,
    "image_channels": 2,
    "num_classes": 5,
    "pre_logits": True,
}
_LSTM = {
    **_SIZES,
    "family": "recurrent",
    "num_decoder_layers": 3,
    "norm": "none",
    "positions": "none",
    "pattern": ("lstm", "moe_only", "lstm"),
    "d_lstm": 20,
}
_SPANS = {"vocabulary": "none", "batch_size": 16, "encoder_length": 16, "decoder_length": 8}
_TEXT = {"objective": "causal", "vocabulary": "none", "batch_size": 16, "decoder_length": 12}
_IMAGES = {"objective": "classification", "batch_size": 16}
_ADAMW = {"name": "adamw", "schedule": "constant", "learning_rate": 1e-2, "warmup_steps": 2}
_ADAFACTOR = {"learning_rate": 0.1, "schedule": "constant", "warmup_steps": 2}
_ANY = {"allow_noncausal_routing": True}
_TOP_2 = {"num_selected_experts": 2, "fill_order": "token_by_token"}


def _run(model: dict[str, Any], moe: dict[str, Any], optimizer: dict[str, Any] = _ADAFACTOR, **train: Any) -> Config:
    data = {"encoder_decoder": _SPANS, "vision": _IMAGES}.get(model.get("family", "encoder_decoder"), _TEXT)
    sizes = {"num_experts": 4, "group_size": 8 if data is _SPANS else 12, "min_expert_capacity": 2}
    return Config.from_dict(
        {
            "model": model,
            "moe": {**sizes, **moe},
            "mesh": {"data": 2, "expert": 4},
            "data": data,
            "optimizer": optimizer,
            "train": {"steps": STEPS, **train},
        }
    )


RUNS = {
    "switch": _run(
        {**_T5, "dropout": 0.1}, {"expert_dropout": 0.2, "input_dropout": 0.1, "no_token_left_behind": 1, **_ANY}
    ),
    "gshard": _run(_T5, {"router": "gshard", "num_selected_experts": 2, **_ANY}),
    "st_moe": _run(
        {**_T5, "pattern": ("dense", "moe_dense"), "activation": "geglu", "tie_embeddings": False},
        {"router": "st_moe", **_TOP_2, "loss_weights": {"router_z_loss": 1e-3}},
    ),
    "mixtral": _run(
        {**_GPT, "norm": "rms", "biases": False, "activation": "swiglu", "num_kv_heads": 2, "pattern": ("moe",)},
        {"router": "top_k", "num_selected_experts": 2, "dropless": True},
        _ADAMW,
    ),
    "sigmoid": _run(_GPT, {"router": "sigmoid", **_TOP_2}, accumulation_steps=2),
    "hash": _run(_GPT, {"router": "hash", "sample_experts": True}, _ADAMW),
    "base": _run({**_GPT, "pattern": ("dense", "base"), "dropout": 0.1}, {"router": "base", "group_size": 24}),
    "sinkhorn": _run(_GPT, {"router": "sinkhorn"}),
    "reinforced": _run(_GPT, {"router": "reinforced"}),
    "pr_moe": _run(
        {**_GPT, "num_decoder_layers": 4},
        {"experts_per_layer": (4, 8), "num_shared_experts": 1, "shared_mixing": "learned", "fill_order": "random"},
    ),
    "peer": _run(
        {**_GPT, "pattern": ("dense", "peer")},
        {"num_experts": 64, "num_selected_experts": 4, "options": {"peer_heads": 2, "peer_query": 8}},
        accumulation_steps=2,
    ),
    "lstm": _run(
        _LSTM,
        {"router": "noisy_top_k", **_TOP_2, "loss_weights": {"importance_loss": 0.1, "load_loss": 0.1}},
        _ADAMW,
    ),
    "hierarchical": _run(
        _LSTM,
        {"router": "hierarchical", **_TOP_2, "options": {"num_expert_groups": 2, "num_selected_groups": 2}},
        _ADAMW,
    ),
    "v_moe": _run(
        _VIT,
        {
            "router": "v_moe",
            "num_selected_experts": 2,
            "group_size": 5,
            "fill_order": "batch_prioritized",
            "loss_weights": {"importance_loss": 0.005, "load_loss": 0.005},
        },
    ),
    "expert_choice": _run(_VIT, {"router": "expert_choice", "group_size": 5, "train_capacity_factor": 2.0}),
    "switch_attention": _run({**_T5, "pattern": ("switch_attention", "moe"), "remat": "full"}, {}),
}


def train(config: Config) -> dict[str, list[str]]:
    """The loss and total loss of each step, as hexadecimal numbers that hold every bit."""
    mesh = make_mesh(config.mesh)
    plan = plan_state(config, mesh)
    make_batch = examples.make_batch if config.model.family == "encoder_decoder" else families.make_batch
    found: dict[str, list[str]] = {"loss": [], "total_loss": []}
    with jax.set_mesh(mesh):
        step, state = lower_train_step(config, plan, mesh).compile(), plan.create()
        for seed in range(STEPS):
            state, metrics = step(state, place_batch(make_batch(config, seed), mesh))
            for name, values in found.items():
                values.append(float(metrics[name]).hex())
    return found


def processor() -> str:
    """The processor, for which XLA compiles and on which the bits of a float32 sum therefore depend."""
    try:
        facts = {line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")}
    except OSError:
        facts = {platform.processor()}
    versions = f"jax {jax.__version__}, Python {sys.version_info.major}.{sys.version_info.minor}"
    return f"{versions}, processor {hashlib.sha256(''.join(sorted(facts)).encode()).hexdigest()[:12]}"


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(RECORDED.read_text())


EVERYDAY = ("switch", "sigmoid")
"""Runs of the everyday tests; CI has them all."""


@pytest.mark.parametrize(
    "name", [name if name in EVERYDAY else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_ten_steps_give_the_recorded_losses(name: str, recorded: dict[str, Any]) -> None:
    found = train(RUNS[name])
    if recorded["processor"] == processor():
        assert found == recorded["runs"][name]
    else:
        # Other CPU instructions round differently, so a token may take another expert; ten steps stay close.
        for loss, values in recorded["runs"][name].items():
            actual, expected = ([float.fromhex(value) for value in each] for each in (found[loss], values))
            np.testing.assert_allclose(actual, expected, rtol=1e-2)


if __name__ == "__main__":
    from tests import conftest  # noqa: F401  the settings of the tests, before anything is compiled

    runs = {name: train(config) for name, config in RUNS.items()}
    RECORDED.write_text(json.dumps({"processor": processor(), "runs": runs}, indent=1) + "\n")
