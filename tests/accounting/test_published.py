"""Printed figures: their rounding, and their comparison with a config."""

import pytest

from switchjax.accounting.accounting import account
from switchjax.accounting.published import PUBLISHED, agrees, meta_training_flops, published_figures
from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig


@pytest.mark.parametrize(
    ("count", "printed", "expected"),
    [
        (395e9, "395B", True),
        (398.9e9, "395B", True),  # within 1 %
        (399.0e9, "395B", False),
        (1.04e12, "1T", True),  # rounds to it
        (1.51e12, "1T", False),
        (1.161e12, "1.2T", True),
        (2.2275e22, "22.27Z", True),
        (8_396_800, "8.4M", True),
        (619_339_008, "619339008", True),
    ],
)
def test_a_count_agrees_within_a_percent_or_if_it_rounds_to_the_print(
    count: float, printed: str, expected: bool
) -> None:
    assert agrees(count, printed) is expected


def test_a_tolerance_is_a_relative_difference() -> None:
    assert agrees(106.9e9, "100B", 0.07)
    assert not agrees(107.1e9, "100B", 0.07)


def test_what_is_no_figure_is_refused() -> None:
    with pytest.raises(ValueError, match="about 3B"):
        agrees(3e9, "about 3B")


def test_every_print_can_be_read_and_every_disagreement_is_explained() -> None:
    for key, published in PUBLISHED.items():
        for figure in ("total", "active", "flops", "training_flops"):
            if printed := getattr(published, figure):
                agrees(1, printed)
        assert published.note or not published.tolerance, key
        assert set(published.tolerance) <= {"total", "active", "flops"}


def test_a_config_of_no_published_model_is_compared_with_nothing() -> None:
    assert published_figures("quickstart:switch", Config()) == ()


def test_parameters_are_counted_with_the_vocabulary_of_the_print(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig(family="decoder_only", vocab_size=4096, pattern=("dense",), tie_embeddings=False)
    config = Config(model=model, data=DataConfig(objective="causal"))
    accounting = account(config)
    inner = accounting.total - 2 * model.vocab_size * model.d_model
    for vocabulary, expected in ((None, accounting.total), (0, inner), (1024, inner + 2 * 1024 * model.d_model)):
        monkeypatch.setitem(PUBLISHED, "some:model", type(PUBLISHED["t5:base"])("1B", vocabulary=vocabulary))
        (total,) = published_figures("some:model", config)
        assert (total.figure, total.ours) == ("total", expected)


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
