"""ST-MoE (Zoph et al. 2022): stable and transferable sparse models; every 4th layer has experts and then a dense FFN.

python scripts/train.py --config=configs/st_moe.py:l --workdir=runs/st_moe_l

Sizes: l (4.1B), 32b (269B, the FLOPs of a dense 32B); runlocal for a small machine.

Top-2 routing uses the second expert only if its gate exceeds 0.2; the router z-loss has weight 1e-3. The paper's
decoder fills slots with all first choices before any second choice, so a token's experts depend on later tokens; here
earlier tokens come first.
"""

from ml_collections import ConfigDict

from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig, TrainConfig, check_choice
from switchjax.config.runlocal import runlocal

SIZES = {
    "l": ({"d_model": 1024, "d_ff": 2816, "num_heads": 16}, {"num_experts": 32, "group_size": 2048}),
    "32b": (
        {"d_model": 5120, "d_ff": 20480, "num_heads": 64, "d_head": 128},
        {"num_experts": 64, "group_size": 4096},
    ),
}


def get_config(arg: str = "l") -> ConfigDict:
    """The config of a size."""
    check_choice("configs/st_moe.py", arg, [*SIZES, "runlocal"])
    model, moe = SIZES.get(arg, SIZES["l"])
    config = Config(
        model=ModelConfig(
            **model,
            num_encoder_layers=24,
            num_decoder_layers=24,
            pattern=("dense", "dense", "dense", "moe_dense"),
            activation="geglu",
            tie_embeddings=False,
            dtype="bfloat16",
        ),
        moe=MoEConfig(
            **moe,
            router="st_moe",
            num_selected_experts=2,
            fill_order="token_by_token",
            jitter_noise=0.0,
            loss_weights={"router_z_loss": 1e-3},
        ),
        data=DataConfig(
            vocabulary_size=32000, num_sentinels=100, batch_size=2048, encoder_length=512, decoder_length=114
        ),
        train=TrainConfig(steps=500_000),
    )
    return (runlocal(config, {"pattern": ("dense", "moe_dense")}) if arg == "runlocal" else config).to_config_dict()
