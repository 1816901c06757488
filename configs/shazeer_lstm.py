"""The sparsely-gated MoE (Shazeer et al. 2017): an LSTM language model with experts between its two LSTM layers.

python scripts/train.py --config=configs/shazeer_lstm.py:moe-32 --workdir=runs/shazeer_moe_32

Sizes: moe-4, moe-32, moe-256 (experts; a token has four), moe-256-h, moe-1024-h, moe-4096-h (16 groups of experts; a
token has two experts in each of two groups), moe-34m, moe-143m (operations per time step); runlocal for a small
machine.

The vocabulary is that of the 1 billion word benchmark. The paper's experts accept all tokens that the router sends
them; here each has room for twice its share. Dropout is 0.1 instead of the paper's best value for each size. The loss
is the full softmax instead of importance sampling.
"""

from ml_collections import ConfigDict

from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig, check_choice
from switchjax.config.runlocal import runlocal

_SMALL = {"d_model": 512, "d_ff": 1024}
_HIERARCHICAL = {"router": "hierarchical", "options": {"num_expert_groups": 16, "num_selected_groups": 2}}

SIZES = {
    **{f"moe-{experts}": (_SMALL, {"num_experts": experts}) for experts in (4, 32, 256)},
    **{f"moe-{experts}-h": (_SMALL, {"num_experts": experts} | _HIERARCHICAL) for experts in (256, 1024, 4096)},
    "moe-34m": ({"d_model": 1024, "d_ff": 2048}, {"num_experts": 1024} | _HIERARCHICAL),
    "moe-143m": ({"d_model": 1024, "d_ff": 8192, "d_lstm": 4096}, {"num_experts": 256} | _HIERARCHICAL),
}


def get_config(arg: str = "moe-32") -> ConfigDict:
    """The config of a size."""
    check_choice("configs/shazeer_lstm.py", arg, [*SIZES, "runlocal"])
    model, moe = SIZES.get(arg, SIZES["moe-256-h"])
    config = Config(
        model=ModelConfig(
            **model,
            family="recurrent",
            vocab_size=793_471,
            num_decoder_layers=3,
            pattern=("lstm", "moe_only", "lstm"),
            norm="none",
            positions="none",
            tie_embeddings=False,
            dropout=0.1,
        ),
        moe=MoEConfig(
            **{"router": "noisy_top_k"} | moe,
            num_selected_experts=4,
            group_size=16_384,
            train_capacity_factor=2.0,
            eval_capacity_factor=2.0,
            fill_order="token_by_token",
            jitter_noise=0.0,
            loss_weights={"load_balance_loss": 0.0, "importance_loss": 0.1, "load_loss": 0.1},
        ),
        data=DataConfig(
            objective="causal",
            corpora=("lm1b",),
            vocabulary_size=793_471,
            num_sentinels=0,
            batch_size=2048,
            decoder_length=128,
        ),
        optimizer=OptimizerConfig(name="adamw", learning_rate=0.03, warmup_steps=1000, b2=0.999),
        train=TrainConfig(steps=27_000),
    )
    if arg == "runlocal":
        config = runlocal(
            config,
            {"num_decoder_layers": 3},
            {"num_experts": 16, "options": {"num_expert_groups": 4, "num_selected_groups": 2}},
        )
    return config.to_config_dict()
