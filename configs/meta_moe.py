"""Meta's language models (Artetxe et al. 2021): GPT-3's sizes, dense and with 512 experts in every other layer.

python scripts/train.py --config=configs/meta_moe.py:125m --workdir=runs/meta_125m

Sizes: 125m, 355m, 1.3b, 2.7b, 6.7b, 13b (dense), 15b, 52b, 207b, 1.1t (MoE, with the shapes of 125m, 355m, 1.3b, 6.7b);
runlocal for a small machine.

The paper's top-2 fills slots with all first choices before any second choice, so a token's experts depend on later
tokens; here earlier tokens come first. Its balance loss is a sum over layers and ours a mean, so our weight is the
paper's times the number of layers.
"""

from ml_collections import ConfigDict

from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig, check_choice
from switchjax.config.runlocal import runlocal

_DENSE = {
    "125m": (12, 768, 12, 6e-4, 256),
    "355m": (24, 1024, 16, 3e-4, 256),
    "1.3b": (24, 2048, 32, 2e-4, 512),
    "2.7b": (32, 2560, 32, 1.6e-4, 512),
    "6.7b": (32, 4096, 32, 1.2e-4, 1024),
    "13b": (40, 5120, 40, 1e-4, 1024),
}
_MOE = {"15b": "125m", "52b": "355m", "207b": "1.3b", "1.1t": "6.7b"}

SIZES = {**{name: (False, *size) for name, size in _DENSE.items()}, **{n: (True, *_DENSE[s]) for n, s in _MOE.items()}}
"""Name -> whether it has experts, layers, d_model, heads, learning rate, rows per batch (the last two as in GPT-3)."""

_LENGTH = 2048
_TOKENS = 300e9


def get_config(arg: str = "125m") -> ConfigDict:
    """The config of a size."""
    check_choice("configs/meta_moe.py", arg, [*SIZES, "runlocal"])
    has_experts, layers, width, heads, learning_rate, rows = SIZES.get(arg, SIZES["15b"])
    config = Config(
        model=ModelConfig(
            family="decoder_only",
            vocab_size=50_257,
            d_model=width,
            d_ff=4 * width,
            num_heads=heads,
            d_head=width // heads,
            num_decoder_layers=layers,
            pattern=("dense", "moe") if has_experts else ("dense",),
            activation="gelu",
            norm="layer",
            biases=True,
            positions="sinusoidal",
            max_length=_LENGTH,
            scale_scores=True,
            scale_logits=False,
            embedding_stddev=0.02,
            dropout=0.1,
            dtype="bfloat16",
        ),
        moe=MoEConfig(
            router="top_k",
            num_experts=512,
            num_selected_experts=2,
            group_size=_LENGTH,
            train_capacity_factor=1.0,  # 2 S / E slots
            eval_capacity_factor=12.8,  # a twentieth of all tokens
            fill_order="token_by_token",
            jitter_noise=0.0,
            loss_weights={"load_balance_loss": 0.01 * layers / 2},
        ),
        data=DataConfig(
            objective="causal", vocabulary_size=50_257, num_sentinels=0, batch_size=rows, decoder_length=_LENGTH
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=learning_rate,
            schedule="linear",
            warmup_steps=round(375e6 / (rows * _LENGTH)),
            b1=0.9,
            b2=0.98,
            weight_decay=0.01,
        ),
        train=TrainConfig(steps=round(_TOKENS / (rows * _LENGTH))),
    )
    return (runlocal(config) if arg == "runlocal" else config).to_config_dict()
