"""The format number of a run's files, and the migration of configs of older formats."""

from collections.abc import Callable, Mapping
from typing import Any

from switchjax.config.checks import UserError

FORMAT = 1
"""The format of config.json and checkpoints that this version writes; files without a number have format 0."""

Values = dict[str, Any]

_PEER = ("peer_heads", "peer_query")
_OPTIONS = {
    "top_k": ("normalize_gates",),
    "st_moe": ("second_expert_threshold",),
    "hierarchical": ("num_expert_groups", "num_selected_groups"),
    "sigmoid": ("bias_update_rate", "normalize_gates"),
    "hash": ("hash_table",),
    "base": ("auction_rounds",),
    "sinkhorn": ("sinkhorn_iterations",),
}
_BALANCE = ("load_balance_loss", "router_z_loss")
_IMPORTANCE = (*_BALANCE, "importance_loss", "load_loss")
_LOSSES = {
    "noisy_top_k": _IMPORTANCE,
    "v_moe": _IMPORTANCE,
    "hierarchical": _IMPORTANCE,
    "reinforced": (*_BALANCE, "policy_loss", "policy_entropy_loss"),
}


def _from_0(values: Values) -> Values:
    """Moves a router's settings from the section `moe` into `moe.options` and `moe.loss_weights`.

    Format 1 also names the arrays of checkpoints by layer.
    """
    moe, model = values.get("moe", {}), values.get("model", {})
    if not isinstance(moe, Mapping) or not isinstance(model, Mapping):
        return values  # not a config of any format; `Config.from_dict` reports that
    router, peer = str(moe.get("router", "switch")), "'peer'" in str(model.get("pattern", ()))
    options = _PEER if peer else _OPTIONS.get(router, ())
    losses = () if peer else _LOSSES.get(router, _BALANCE)
    moved = {
        "options": {name: moe[name] for name in options if name in moe},
        "loss_weights": {name: moe[f"{name}_weight"] for name in losses if f"{name}_weight" in moe},
    }
    # A file written by hand has no format number, but may have the keys of format 1.
    moved = {name: values or moe.get(name, {}) for name, values in moved.items()}
    gone = {*_PEER, *(name for names in _OPTIONS.values() for name in names)}
    gone |= {f"{name}_weight" for names in _LOSSES.values() for name in names}
    return values | {"moe": {name: value for name, value in moe.items() if name not in gone} | moved}


MIGRATIONS: dict[int, Callable[[Values], Values]] = {0: _from_0}
"""Older format -> the function that converts its sections to those of the next format."""


def format_of(saved: Mapping[str, Any]) -> int:
    """The format number of a saved config; raises a `UserError` if this version cannot read it."""
    number = saved.get("format", 0)
    if type(number) is not int or not 0 <= number <= FORMAT:
        raise UserError(f"format {number!r} is not known here, only 0 to {FORMAT}: use the switchjax that wrote it")
    return number


def migrate(saved: Mapping[str, Any]) -> Values:
    """The sections of a saved config in this version's format."""
    values = {key: value for key, value in saved.items() if key != "format"}
    for number in range(format_of(saved), FORMAT):
        values = MIGRATIONS[number](values)
    return values
