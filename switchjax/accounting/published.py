"""The figures that papers print of their models, and the reasons why some configs differ.

Figures are strings as printed, so that their rounding is known. Those of GLaM, Expert choice, GShard, DeepSpeed-MoE,
ST-MoE, V-MoE and Shazeer et al. come from the papers' tables; those of T5, Switch-Base and Mixtral come from the
released checkpoints.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from switchjax.accounting.accounting import account
from switchjax.config import Config

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, "Z": 1e21}
TOLERANCE = 0.01


@dataclass(frozen=True)
class Published:
    """The printed figures of a model; an empty string if one is not printed."""

    total: str
    """Parameters."""
    active: str = ""
    """Parameters that a token uses."""
    flops: str = ""
    """FLOPs of a sequence's forward pass."""
    training_flops: str = ""
    """FLOPs of the training run by Meta's formula."""
    vocabulary: int | None = None
    """Vocabulary of the printed counts if it is not the config's; 0 means counts without embeddings."""
    tolerance: Mapping[str, float] = field(default_factory=dict)
    """Figure -> relative difference, if it is more than 1 %; `note` explains it."""
    note: str = ""


class PublishedFigure(NamedTuple):
    """A figure of a config and the printed one."""

    figure: str
    """A field of `Published`."""
    ours: float
    printed: str
    agrees: bool
    """True within the tolerance."""


def published_figures(key: str, config: Config) -> tuple[PublishedFigure, ...]:
    """The figures of a config beside those printed of `key` (`switch:c`); none if `PUBLISHED` lacks the key."""
    if (published := PUBLISHED.get(key)) is None:
        return ()
    accounting = account(config)
    ours: dict[str, float] = {
        "total": _with_vocabulary(accounting.parameters, config, published.vocabulary),
        "active": _with_vocabulary(accounting.active_parameters, config, published.vocabulary),
        "flops": accounting.forward_flops,
        "training_flops": meta_training_flops(config),
    }
    return tuple(
        PublishedFigure(figure, value, printed, agrees(value, printed, published.tolerance.get(figure, TOLERANCE)))
        for figure, value in ours.items()
        if (printed := getattr(published, figure))
    )


def agrees(count: float, printed: str, tolerance: float = TOLERANCE) -> bool:
    """True if `count` lies within the tolerance of the printed figure (such as 395B or 22.27Z), or rounds to it."""
    match = re.fullmatch(r"(\d+(?:\.(\d+))?)([KMBTZ]?)", printed)
    if match is None:
        raise ValueError(f"'{printed}' is no printed figure")
    digits, decimals, unit = match.groups()
    figure, half = float(digits) * _UNITS[unit], 0.5 * 10.0 ** -len(decimals or "") * _UNITS[unit]
    return abs(count - figure) <= max(half, tolerance * figure)


def meta_training_flops(config: Config, tokens: float = 300e9) -> float:
    """Training FLOPs of a decoder with feed-forward width 4 h on T = `tokens`, as Artetxe et al. 2021 print them.

    `96 T l h^2 (1 + s / 6h + V / 16lh)`, which counts the forward pass twice for recomputed activations, plus
    `64 T h^2` for each selected expert after the first in each of the l / 2 MoE layers.
    """
    model = config.model
    layers, width, length = model.num_decoder_layers, model.d_model, config.data.decoder_length
    share = 1 + length / (6 * width) + model.vocab_size / (16 * layers * width)
    dense = 96 * tokens * layers * width**2 * share
    extra = config.moe.num_selected_experts - 1 if model.has_experts else 0
    return dense + layers / 2 * extra * 64 * tokens * width**2


def _with_vocabulary(parts: Mapping[str, int], config: Config, vocabulary: int | None) -> int:
    """The sum of all parts, scaled to a vocabulary of this size."""
    total = sum(parts.values())
    if vocabulary is None:
        return total
    tables = parts["embeddings"] + parts.get("logits", 0)
    return total - tables + tables * vocabulary // config.model.vocab_size


_GSHARD = (
    "The table's own experts, of 2 x 1024 x 8192 weights each, hold more than its total: 618B of 600B, 38.7B of 37B, "
    "12.9B of 12.5B."
)
_GLAM = "Counted with a vocabulary of 32,000, though the text has 256,000."
_GLAM_SMALL = (
    "Counted with a vocabulary of 32,000, though the text has 256,000; the active count is then 7M less than the sum "
    "of its parts, as much as one dense feed-forward layer."
)
_GLAM_20B = f"{_GLAM} 20B is a slip: by the active count and the other rows, 32 experts in 12 layers hold 12.9B."
_SHAZEER = "Without embeddings and softmax (406M each of 512, 813M each of 1024 numbers a word)."
_SHAZEER_H = f"{_SHAZEER} The printed operations count the gates of a token's two groups; here all groups' gates count."
_GPT_3 = "The name of GPT-3's model of this shape, which also has learned positions."
_SWITCH_XXL = "128 experts, as released and as the total needs; the paper prints 64."
_SWITCH_C = "30 heads, as released; the paper prints 32, which give the printed FLOPs."
_ST_MOE_L = "The convention that gives the FLOPs of T5, Switch and 32B gives neither these nor those of the dense twin."
_DENSE_SMALL, _SPARSE_SMALL = {"total": 0.07, "active": 0.07}, {"active": 0.06}


def _totals(system: str, totals: dict[str, str], **shared: Any) -> dict[str, Published]:
    """Models of one system, by size, of which only the total and the `shared` fields are printed."""
    return {f"{system}:{size}": Published(total, **shared) for size, total in totals.items()}


PUBLISHED: dict[str, Published] = {
    "t5:base": Published("222.90M", flops="124B"),
    "t5:large": Published("737.67M", flops="425B"),
    "t5:xxl": Published("11.1B", flops="6.3T"),
    **_totals("t5", {"v1_1-base": "247577856", "v1_1-large": "783150080", "v1_1-xl": "2849757184"}),
    "t5:v1_1-xxl": Published("11135332352"),
    "switch:base-8": Published("619339008"),
    "switch:base-128": Published("7415217408", flops="124B"),
    "switch:large-128": Published("26.3B", flops="425B"),
    "switch:xxl-128": Published("395B", flops="6.3T", note=_SWITCH_XXL),
    "switch:c": Published("1571B", flops="890B", tolerance={"flops": 0.03}, note=_SWITCH_C),
    "st_moe:l": Published("4.1B", flops="645B", tolerance={"flops": 0.15}, note=_ST_MOE_L),
    "st_moe:32b": Published("269B", flops="20.2T"),
    "gshard:12.5b": Published("12.5B", tolerance={"total": 0.06}, note=_GSHARD),
    "gshard:37b": Published("37B", tolerance={"total": 0.07}, note=_GSHARD),
    **_totals(
        "gshard",
        {"50b": "50B", "200b": "200B", "150b": "150B", "600b": "600B", "1t": "1T"},
        tolerance={"total": 0.04},
        note=_GSHARD,
    ),
    **_totals("meta_moe", {"125m": "125M", "2.7b": "2.7B"}, tolerance={"total": 0.02}, note=_GPT_3),
    **_totals("meta_moe", {"355m": "355M", "1.3b": "1.3B", "6.7b": "6.7B", "13b": "13B", "52b": "52B", "207b": "207B"}),
    "meta_moe:15b": Published("15B", training_flops="0.43Z"),
    "meta_moe:1.1t": Published("1.1T", training_flops="22.27Z"),
    "glam:0.1b": Published("130M", "130M", vocabulary=32_000, tolerance=_DENSE_SMALL, note=_GLAM_SMALL),
    "glam:0.1b-64e": Published("1.9B", "145M", vocabulary=32_000, tolerance=_SPARSE_SMALL, note=_GLAM_SMALL),
    "glam:1.7b": Published("1.7B", vocabulary=32_000, note=_GLAM),
    "glam:1.7b-32e": Published("20B", "1.878B", vocabulary=32_000, tolerance={"total": 0.31}, note=_GLAM_20B),
    "glam:1.7b-64e": Published("27B", "1.879B", vocabulary=32_000, note=_GLAM),
    "glam:1.7b-128e": Published("53B", "1.881B", vocabulary=32_000, note=_GLAM),
    "glam:1.7b-256e": Published("105B", "1.886B", vocabulary=32_000, note=_GLAM),
    "glam:8b": Published("8.7B", "8.7B", vocabulary=32_000, note=_GLAM),
    "glam:8b-64e": Published("143B", "9.8B", vocabulary=32_000, note=_GLAM),
    "glam:137b": Published("137B", "137B", vocabulary=32_000, note=_GLAM),
    "glam:64b-64e": Published("1.2T", "96.6B", note="Counted with the full vocabulary, unlike the smaller models."),
    "expert_choice:0.1b": Published("130M", "130M", vocabulary=32_000, tolerance=_DENSE_SMALL, note=_GLAM_SMALL),
    "expert_choice:0.1b-16e": Published("548M", "145M", vocabulary=32_000, tolerance=_SPARSE_SMALL, note=_GLAM_SMALL),
    "expert_choice:0.1b-32e": Published("1.0B", "145M", vocabulary=32_000, tolerance=_SPARSE_SMALL, note=_GLAM_SMALL),
    "expert_choice:0.1b-64e": Published("1.9B", "145M", vocabulary=32_000, tolerance=_SPARSE_SMALL, note=_GLAM_SMALL),
    "expert_choice:0.1b-128e": Published("3.7B", "145M", vocabulary=32_000, tolerance=_SPARSE_SMALL, note=_GLAM_SMALL),
    "expert_choice:8b": Published("8.7B", "8.7B", vocabulary=32_000, note=_GLAM),
    "expert_choice:8b-64e": Published("143B", "9.8B", vocabulary=32_000, note=_GLAM),
    "mixtral:8x7b": Published("46702792704", "12879925248"),
    "mixtral:8x22b": Published("140620634112", "39B"),
    "deepspeed_moe:350m": Published("350M", tolerance={"total": 0.02}, note="GPT-3 Medium, named by a round figure."),
    **_totals("deepspeed_moe", {"1.3b": "1.3B", "6.7b": "6.7B", "350m-moe-128": "13B", "1.3b-moe-128": "52B"}),
    **_totals("deepspeed_moe", {"350m-pr-moe": "4B", "1.3b-pr-moe": "31B", "350m-mos": "3.5B", "1.3b-mos": "27B"}),
    **_totals("vit", {"s-32": "36.5M", "b-32": "102.1M", "b-16": "100.5M"}),
    **_totals("vit", {"l-32": "325.3M", "l-16": "323.1M", "h-14": "655.8M"}),
    **_totals("vmoe", {"s-32-every2": "296.9M", "b-32-every2": "980.6M", "b-16-every2": "979.0M"}),
    **_totals("vmoe", {"l-16-every2": "3446.0M", "h-14-every2": "7160.8M", "h-14-last5": "2688.6M", "15b": "14705.1M"}),
    **_totals("soft_moe", {"s-16-128e": "933M", "s-14-256e": "1.8B", "b-16-128e": "3.7B"}),
    **_totals("soft_moe", {"l-16-128e": "13.1B", "h-14-128e": "27.3B", "h-14-256e": "54.1B"}),
    "shazeer_lstm:moe-4": Published("8.4M", "8.4M", vocabulary=0, note=_SHAZEER),
    "shazeer_lstm:moe-32": Published("37.8M", "8.4M", vocabulary=0, note=_SHAZEER),
    "shazeer_lstm:moe-256": Published("272.9M", "8.6M", vocabulary=0, note=_SHAZEER),
    **_totals(
        "shazeer_lstm",
        {"moe-256-h": "272.9M", "moe-1024-h": "1079.0M", "moe-4096-h": "4303.4M", "moe-34m": "4313.9M"},
        vocabulary=0,
        note=_SHAZEER_H,
    ),
    "shazeer_lstm:moe-143m": Published("4371.1M", vocabulary=0, note=_SHAZEER_H),
}
"""`file:size` of configs/ -> the printed figures."""
