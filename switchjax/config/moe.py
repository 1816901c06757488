"""The section `moe`: routing, capacity and losses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from switchjax.config.checks import check_choices, check_fraction, check_positive, require


class Settings(dict[str, Any]):
    """Named values that nobody changes, so that a config that holds them can be hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


@dataclass(frozen=True)
class MoEConfig:
    """Routing, capacity and losses of the MoE layers."""

    router: str = "switch"
    """A name of `switchjax.moe.routers.ROUTERS`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The router's own options, or those of PEER or soft MoE: see the dataclass beside its equation."""
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of the router's losses, by name; a loss that is left out has its default weight."""
    num_experts: int = 8
    experts_per_layer: tuple[int, ...] = ()
    """Experts of each routed layer of a stack, first to last (DeepSpeed-MoE's pyramid); empty: num_experts in all."""
    num_selected_experts: int = 1
    """K."""
    group_size: int = 512
    """Most tokens that compete for the same buffers (whole rows, or an even part of one); the mesh plays no part. 0:
    those of a row, however long."""
    train_capacity_factor: float = 1.25
    eval_capacity_factor: float = 2.0
    min_expert_capacity: int = 4
    expert_capacity: int = 0
    """Slots of an expert for each group whatever its size, as in Hugging Face's Switch; 0: by the factors above."""
    dropless: bool = False
    """Every expert has room for every token; the capacity factors then mean nothing."""
    dispatch: Literal["gather", "einsum", "ragged"] = "gather"
    """einsum takes one-hot masks; ragged is grouped products (dropless, experts on one device; fast on TPUs)."""

    fill_order: Literal["first_come", "token_by_token", "batch_prioritized", "random"] = "first_come"
    """Who gets the slots of a full expert: all first choices before any second (first_come), earlier tokens with all
    their choices (token_by_token), the highest gate (batch_prioritized), or in training anyone (random)."""
    no_token_left_behind: int = 0
    """Rounds in which a choice that found no slot goes to the token's next best expert."""
    sample_experts: bool = False
    """In training, experts are drawn from the router's distribution instead of its K best."""
    jitter_noise: float = 0.01
    """In training, the router's input is multiplied by U(1 - jitter_noise, 1 + jitter_noise)."""
    input_dropout: float = 0.0
    """In training, the rate of dropout on the router's input."""
    expert_dropout: float = 0.0
    allow_noncausal_routing: bool = False
    """Let a decoder route by what comes after a token, as expert choice and orders across tokens do."""

    num_shared_experts: int = 0
    """Experts that every token passes through beside the routed ones."""
    shared_mixing: Literal["sum", "learned"] = "sum"
    """How their output joins; learned is a softmax of two weights a token, as in DeepSpeed-MoE's code."""

    def __post_init__(self) -> None:
        sizes = (
            "num_experts",
            "num_selected_experts",
            "train_capacity_factor",
            "eval_capacity_factor",
            "min_expert_capacity",
        )
        check_positive("moe", {name: getattr(self, name) for name in sizes})
        check_positive("moe", {f"experts_per_layer[{i}]": n for i, n in enumerate(self.experts_per_layer)})
        fractions = ("jitter_noise", "input_dropout", "expert_dropout")
        check_fraction("moe", {name: getattr(self, name) for name in fractions})
        check_choices("moe", self)
        for name, experts in [
            ("num_experts", self.num_experts),
            *(("experts_per_layer", n) for n in self.experts_per_layer),
        ]:
            require(
                self.num_selected_experts <= experts,
                f"moe.num_selected_experts={self.num_selected_experts} exceeds moe.{name}={experts}",
            )
        require(
            self.dispatch != "ragged" or self.dropless,
            "moe.dispatch=ragged drops no token: it needs moe.dropless=True",
        )
        require(
            self.dispatch != "ragged" or self.expert_dropout == 0,
            "moe.dispatch=ragged has no expert dropout: set moe.expert_dropout=0",
        )
        for name in (
            "no_token_left_behind",
            "num_shared_experts",
            "group_size",
            "expert_capacity",
        ):
            require(getattr(self, name) >= 0, f"moe.{name} must not be negative, got {getattr(self, name)}")
        for name, weight in self.loss_weights.items():
            require(weight >= 0, f"moe.loss_weights.{name} must not be negative, got {weight}")
        for name in ("options", "loss_weights"):  # as of JSON or a ConfigDict
            values = {
                key: tuple(value) if isinstance(value, list) else value for key, value in getattr(self, name).items()
            }
            object.__setattr__(self, name, Settings(values))

    def tokens_per_group(self, rows: int, length: int) -> int:
        """S, the tokens of a group when `rows` x `length` tokens are divided into groups of at most `group_size`.

        Rows shorter than that are grouped whole, as many as fit and divide `rows`; a longer row is divided evenly; for
        0, each row is a group. The mesh plays no part, so a model computes the same on every mesh.

        Raises:
            UserError: if `group_size` does not divide a longer row.
        """
        if self.group_size == 0:
            return length
        if self.group_size >= length:
            return length * max(n for n in range(1, self.group_size // length + 1) if rows % n == 0)
        require(
            length % self.group_size == 0,
            f"moe.group_size={self.group_size} neither divides a row of {length} tokens nor holds one",
        )
        return self.group_size
