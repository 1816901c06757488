"""GShard's M4 (Lepikhin et al. 2020): translation from 100 languages, top-2 experts in every other layer.

python scripts/train.py --config=configs/gshard.py:37b --workdir=runs/gshard_37b

Sizes: 12.5b, 50b, 200b (12 layers with 128, 512, 2048 experts), 37b, 150b, 600b (36 layers), 1t (60 layers with 2048);
runlocal for a small machine.

As in the paper's table, the layers of encoder and decoder are counted together; each has half of them. The paper has a
source vocabulary of 64,000 and a target vocabulary of 32,000; here both share the larger one. The paper does not
describe the rest of the model: norms, positions and the tied output layer are T5's. Its decoder fills slots with all
first choices before any second choice, so a token's experts depend on later tokens; here earlier tokens come first.
"""

from ml_collections import ConfigDict

from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig, TrainConfig, check_choice
from switchjax.config.runlocal import runlocal

SIZES = {
    "12.5b": (12, 128),
    "50b": (12, 512),
    "200b": (12, 2048),
    "37b": (36, 128),
    "150b": (36, 512),
    "600b": (36, 2048),
    "1t": (60, 2048),
}
"""Name -> layers of both stacks, experts per layer."""


def get_config(arg: str = "37b") -> ConfigDict:
    """The config of a size."""
    check_choice("configs/gshard.py", arg, [*SIZES, "runlocal"])
    layers, experts = SIZES.get(arg, SIZES["37b"])
    config = Config(
        model=ModelConfig(
            vocab_size=64_128,
            d_model=1024,
            d_ff=8192,
            num_heads=16,
            d_head=128,
            num_encoder_layers=layers // 2,
            num_decoder_layers=layers // 2,
            dropout=0.1,
            # In the paper only the 60-layer model was tried in bfloat16; its training was unstable.
            dtype="bfloat16" if arg == "1t" else "float32",
        ),
        moe=MoEConfig(
            router="gshard",
            num_experts=experts,
            num_selected_experts=2,
            group_size=2048,
            train_capacity_factor=1.0,
            eval_capacity_factor=1.0,
            fill_order="token_by_token",
            jitter_noise=0.0,
        ),
        data=DataConfig(
            vocabulary_size=64_000, num_sentinels=128, batch_size=4096, encoder_length=1024, decoder_length=1024
        ),
        train=TrainConfig(steps=250_000),
    )
    return (runlocal(config) if arg == "runlocal" else config).to_config_dict()
