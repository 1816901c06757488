"""The papers' formulas against their printed figures."""

import pytest

from switchjax.accounting.training_cost import meta_training_flops
from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig


def meta(layers: int, width: int, pattern: tuple[str, ...]) -> Config:
    return Config(
        model=ModelConfig(
            family="decoder_only",
            vocab_size=50_257,
            d_model=width,
            d_ff=4 * width,
            num_decoder_layers=layers,
            pattern=pattern,
        ),
        moe=MoEConfig(num_experts=512, num_selected_experts=2),
        data=DataConfig(objective="causal", decoder_length=2048),
    )


@pytest.mark.parametrize(("layers", "width", "zettaflops"), [(12, 768, 0.43), (32, 4096, 22.27)])  # 15B, 1.1T
def test_the_moe_models_cost_what_is_printed(layers: int, width: int, zettaflops: float) -> None:
    flops = meta_training_flops(meta(layers, width, ("dense", "moe")))
    assert flops / 1e21 == pytest.approx(zettaflops, abs=0.006)


def test_a_second_expert_is_all_that_an_moe_model_costs_more() -> None:
    sparse, dense = (meta_training_flops(meta(12, 768, pattern)) for pattern in (("dense", "moe"), ("dense", "dense")))
    assert sparse - dense == pytest.approx(6 * 64 * 300e9 * 768**2)
