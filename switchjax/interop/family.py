"""The exchange of a family with transformers: the table of its tensors, and the translation of its config.

In a rule, `{layer}` stands for the layer's number in its stack, and `{expert}` in transformers' name for the axis of
experts in ours. Axes in layouts: d model, f feed-forward, h heads, a head dimension, v vocabulary, b buckets,
n positions, i inputs, o outputs, p and q height and width of a patch, c channels.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from switchjax.config import Config, ModelConfig, UserError

Values = dict[str, Any]
"""Values by key: keys of config.json, or `section.key` of our config."""

MATRIX, SAME = "i o -> o i", "o -> o"
VECTORS, LOGITS = "v d -> v d", "d v -> v d"
ATTENTION = {
    "query": "d h a -> (h a) d",
    "key": "d h a -> (h a) d",
    "value": "d h a -> (h a) d",
    "out": "h a d -> d (h a)",
}
ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}
"""Names of activations: transformers' -> ours."""
NO_Z_LOSS = {"train.z_loss_weight": 0.0}
"""transformers' losses contain no z-loss of the output logits."""


class Rule(NamedTuple):
    """Our parameter's name, transformers' tensor, and the layout between them (`switchjax.interop.layouts`)."""

    ours: str
    theirs: str
    layout: str


@dataclass(frozen=True)
class Table:
    """The tensors of a model."""

    rules: tuple[Rule, ...]
    """The parameters that are converted."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Further tensors that a file may hold -> the converted tensor that each must equal."""
    written: tuple[str, ...] = ()
    """The copies that we write too, because transformers would otherwise initialise them at random."""
    unused: tuple[str, ...] = ()
    """Further tensors that a file may hold but transformers' model does not read."""


class Key(NamedTuple):
    """A value that only has two names, and transformers' default if config.json lacks it."""

    theirs: str
    ours: str
    default: Any


@dataclass(frozen=True)
class Family:
    """The translation of one `model_type` of transformers."""

    architecture: str
    """transformers' class, with the output head that is converted."""
    table: Callable[[ModelConfig], Table]
    """Makes the table of a model's tensors."""
    keys: tuple[Key, ...]
    """Values that only differ in their names."""
    theirs: Mapping[str, Any]
    """Values that config.json must have, or lack."""
    ours: Mapping[str, Any]
    """Values that our config must have."""
    read: Callable[[Mapping[str, Any], Set[str]], Values]
    """Computes the other values of our config from config.json and the names of the tensors."""
    write: Callable[[Config], Values]
    """Computes the other values of config.json from our config."""


def attention_rules(ours: str, theirs: str, names: tuple[str, str, str, str]) -> list[Rule]:
    """The rules for the kernels of queries, keys, values and output, which transformers calls `names`."""
    layers = zip(ATTENTION.items(), names, strict=True)
    return [Rule(f"{ours}/{here}", f"{theirs}.{there}.weight", layout) for (here, layout), there in layers]


def our_activation(name: str, known: Mapping[str, str], key: str) -> str:
    """Our name of an activation; raises a `UserError` that names the key of config.json if it is unknown."""
    if name not in known:
        raise UserError(f"config.json: {key}={name!r} is not supported, only {', '.join(map(repr, known))}")
    return known[name]


def their_activation(name: str, known: Mapping[str, str]) -> str:
    """transformers' (first) name of our activation; raises a `UserError` if its model lacks the activation."""
    for theirs, ours in known.items():
        if ours == name:
            return theirs
    raise UserError(
        f"Hugging Face's model does not support model.activation={name}, only {', '.join(sorted(set(known.values())))}"
    )
