"""The section `moe`: routing, capacity and losses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from switchjax.config.checks import check_choices, check_fraction, check_not_negative, check_positive, require


class Settings(dict[str, Any]):
    """Named values that are never changed, so that a config with them can be hashed."""

    def __hash__(self) -> int:  # type: ignore[override]  # dict has None here
        return hash(frozenset(self.items()))


@dataclass(frozen=True)
class MoEConfig:
    """Routing, capacity and losses of the MoE layers."""

    router: str = "switch"
    """A name in `switchjax.moe.routers.ROUTERS`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the router, of PEER or of soft MoE: see the dataclass beside the equation."""
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of the router's losses by name; a missing loss has its default weight."""
    num_experts: int = 8
    experts_per_layer: tuple[int, ...] = ()
    """Number of experts of each routed layer of a stack, in order (DeepSpeed-MoE's pyramid); empty: num_experts."""
    num_selected_experts: int = 1
    """K."""
    group_size: int = 512
    """Largest number of tokens that compete for the same buffers: whole rows, or an equal part of one, on any mesh. 0:
    one row, whatever its length."""
    train_capacity_factor: float = 1.25
    eval_capacity_factor: float = 2.0
    min_expert_capacity: int = 4
    expert_capacity: int = 0
    """Slots of an expert for each group of any size, as in Hugging Face's Switch; 0: use the capacity factors."""
    dropless: bool = False
    """If true, every expert has room for every token, and capacity factors have no effect."""
    dispatch: Literal["gather", "einsum", "ragged"] = "gather"
    """einsum uses one-hot masks, ragged grouped products (dropless, all experts on one device; fast on TPUs)."""

    fill_order: Literal["first_come", "token_by_token", "batch_prioritized", "random"] = "first_come"
    """The choices that get the slots of a full expert: first choices before second choices (first_come), all choices of
    earlier tokens (token_by_token), the highest gates (batch_prioritized), or in training random ones (random)."""
    no_token_left_behind: int = 0
    """Number of rounds in which choices without a slot go to the token's next best expert."""
    sample_experts: bool = False
    """If true, in training, experts are drawn from the router's distribution instead of the K best."""
    jitter_noise: float = 0.01
    """In training, the router's input is multiplied by U(1 - jitter_noise, 1 + jitter_noise)."""
    input_dropout: float = 0.0
    """In training, the dropout rate of the router's input."""
    expert_dropout: float = 0.0
    allow_noncausal_routing: bool = False
    """If true, a decoder may use routers in which later tokens change a token's experts, such as expert_choice."""

    num_shared_experts: int = 0
    """Number of experts that every token passes through in addition to the routed ones."""
    shared_mixing: Literal["sum", "learned"] = "sum"
    """Joins shared and routed outputs; learned is a softmax of two weights per token, as in DeepSpeed-MoE's code."""

    def __post_init__(self) -> None:
        sizes = ["num_experts", "num_selected_experts", "min_expert_capacity"]
        sizes += ["train_capacity_factor", "eval_capacity_factor"]
        check_positive("moe", {name: getattr(self, name) for name in sizes})
        check_positive("moe", {f"experts_per_layer[{i}]": n for i, n in enumerate(self.experts_per_layer)})
        fractions = ("jitter_noise", "input_dropout", "expert_dropout")
        check_fraction("moe", {name: getattr(self, name) for name in fractions})
        check_choices("moe", self)
        selected = self.num_selected_experts
        layers = [("num_experts", self.num_experts), *(("experts_per_layer", n) for n in self.experts_per_layer)]
        for name, experts in layers:
            require(selected <= experts, f"moe.num_selected_experts={selected} exceeds moe.{name}={experts}")
        ragged = self.dispatch == "ragged"
        require(not ragged or self.dropless, "moe.dispatch=ragged drops no token: it needs moe.dropless=True")
        message = "moe.dispatch=ragged has no expert dropout: set moe.expert_dropout=0"
        require(not ragged or self.expert_dropout == 0, message)
        counts = ("no_token_left_behind", "num_shared_experts", "group_size", "expert_capacity")
        check_not_negative("moe", {name: getattr(self, name) for name in counts})
        check_not_negative("moe.loss_weights", self.loss_weights)
        for name in ("options", "loss_weights"):
            # JSON and ConfigDict have lists, which cannot be hashed.
            values = getattr(self, name).items()
            hashable = {key: tuple(value) if isinstance(value, list) else value for key, value in values}
            object.__setattr__(self, name, Settings(hashable))

    def tokens_per_group(self, rows: int, length: int) -> int:
        """S, the number of tokens of a group when `rows` x `length` tokens are divided into groups.

        Short rows are grouped whole: as many as fit `group_size` and divide `rows`. A row longer than `group_size` is
        divided evenly. If `group_size` is 0, each row is a group. S does not depend on the mesh, so a model computes
        the same on every mesh.

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
