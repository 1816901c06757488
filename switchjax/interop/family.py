"""What it takes to exchange a family with transformers: the table of its tensors, and its config on either side.

A rule's names may hold `{layer}`, which counts from the bottom of its stack, and theirs `{expert}` where ours has an
axis of experts. Letters of layouts: d model, f feed-forward, h heads, a dimension of a head, v vocabulary, b buckets, n
positions, i inputs, o outputs, p and q sides of a patch, c channels.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from switchjax.config import Config, ModelConfig, UserError

Values = dict[str, Any]
"""Keys of config.json, or `section.key` of ours, and their values."""

MATRIX, SAME = "i o -> o i", "o -> o"
VECTORS, LOGITS = "v d -> v d", "d v -> v d"
ATTENTION = {
    "query": "d h a -> (h a) d",
    "key": "d h a -> (h a) d",
    "value": "d h a -> (h a) d",
    "out": "h a d -> d (h a)",
}
ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}
"""transformers' name -> ours."""
NO_Z_LOSS = {"train.z_loss_weight": 0.0}
"""transformers' losses have none of the output logits."""


class Rule(NamedTuple):
    """A parameter here, its tensor there, and the layout from one to the other (`switchjax.interop.layouts`)."""

    ours: str
    theirs: str
    layout: str


@dataclass(frozen=True)
class Table:
    """The tensors of a model.

    Attributes:
        rules: what is converted.
        copies: tensors that a file may hold besides, equal to another one.
        written: those of them that are written all the same, since without them transformers would draw new ones.
        unused: tensors that a file may hold besides, which their model does not read either.
    """

    rules: tuple[Rule, ...]
    copies: Mapping[str, str] = field(default_factory=dict)
    written: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


class Key(NamedTuple):
    """A value that only has another name, and what transformers takes where config.json leaves it out."""

    theirs: str
    ours: str
    default: Any


@dataclass(frozen=True)
class Family:
    """How a `model_type` of transformers is told here.

    Attributes:
        architecture: the class with the head that is converted.
        table: of a model's tensors.
        keys: values that only have other names.
        theirs: what config.json must say, or leave out.
        ours: what our config must say.
        read: what else our config says, from config.json and the names of the tensors.
        write: what else config.json says, from our config.
    """

    architecture: str
    table: Callable[[ModelConfig], Table]
    keys: tuple[Key, ...]
    theirs: Mapping[str, Any]
    ours: Mapping[str, Any]
    read: Callable[[Mapping[str, Any], Set[str]], Values]
    write: Callable[[Config], Values]


def attention_rules(ours: str, theirs: str, names: tuple[str, str, str, str]) -> list[Rule]:
    """Of the kernels of queries, keys, values and the output, called `names` there."""
    layers = zip(ATTENTION.items(), names, strict=True)
    return [Rule(f"{ours}/{here}", f"{theirs}.{there}.weight", layout) for (here, layout), there in layers]


def our_activation(name: str, known: Mapping[str, str], key: str) -> str:
    """Our name of an activation; a `UserError` that names the key for one that is not known."""
    if name not in known:
        raise UserError(f"config.json: {key}={name!r} is not supported, only {', '.join(map(repr, known))}")
    return known[name]


def their_activation(name: str, known: Mapping[str, str]) -> str:
    """The first of transformers' names of our activation; a `UserError` if it has none."""
    for theirs, ours in known.items():
        if ours == name:
            return theirs
    raise UserError(
        f"Hugging Face's model has no model.activation={name}, only {', '.join(sorted(set(known.values())))}"
    )
