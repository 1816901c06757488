"""The section `moe`: routing, capacity and losses."""

from dataclasses import dataclass

from switchjax.config.checks import check_choice, check_fraction, check_positive, require


@dataclass(frozen=True)
class MoEConfig:
    """Routing, capacity and losses of the MoE layers."""

    router: str = "switch"
    """A name of `switchjax.moe.routers.ROUTERS`."""
    num_experts: int = 8
    experts_per_layer: tuple[int, ...] = ()
    """Experts of each routed layer of a stack, first to last (DeepSpeed-MoE's pyramid); empty: num_experts in all."""
    num_selected_experts: int = 1
    """K; a hierarchical router selects K / num_selected_groups in each group of experts that it selects."""
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
    dispatch: str = "gather"
    """gather, einsum (one-hot masks), or ragged (dropless, experts on one device: grouped products, fast on TPUs)."""

    fill_order: str = "first_come"
    """Who gets the slots of a full expert: first_come (all first choices before any second), token_by_token (earlier
    tokens with all their choices), batch_prioritized (highest gate first) or random (in training)."""
    no_token_left_behind: int = 0
    """Rounds in which a choice that found no slot goes to the token's next best expert."""
    normalize_gates: bool = True
    """Gates of a token's K > 1 experts sum to 1 (routers top_k and sigmoid)."""
    sample_experts: bool = False
    """In training, experts are drawn from the router's distribution instead of its K best."""
    jitter_noise: float = 0.01
    """In training, the router's input is multiplied by U(1 - jitter_noise, 1 + jitter_noise)."""
    input_dropout: float = 0.0
    """In training, the rate of dropout on the router's input."""
    expert_dropout: float = 0.0
    second_expert_threshold: float = 0.2
    """st_moe: the gate that a second expert must exceed."""
    num_expert_groups: int = 1
    """hierarchical: groups that the experts are divided into."""
    num_selected_groups: int = 1
    """hierarchical: groups that a token selects."""
    bias_update_rate: float = 0.001
    """sigmoid: the step by which an expert's bias rises or falls after each train step."""
    hash_table: str = "random"
    """hash: random, balanced (by the corpora's token counts) or clustered (by the embeddings of `init_from`)."""
    sinkhorn_iterations: int = 20
    auction_rounds: int = 2000
    """base: most rounds of bidding; tokens without an expert then take what is left, in order."""
    allow_noncausal_routing: bool = False
    """Let a decoder route by what comes after a token, as expert choice and orders across tokens do."""

    num_shared_experts: int = 0
    """Experts that every token passes through beside the routed ones."""
    shared_mixing: str = "sum"
    """How their output joins: sum, or learned (a softmax of two weights a token, DeepSpeed-MoE's code)."""
    peer_heads: int = 8
    """peer: heads, each of which selects num_selected_experts of the num_experts single neurons."""
    peer_query: int = 256
    """peer: length of a head's query."""

    load_balance_loss_weight: float = 0.01
    router_z_loss_weight: float = 0.0
    importance_loss_weight: float = 0.0
    load_loss_weight: float = 0.0
    policy_loss_weight: float = 0.01
    """reinforced: weight of the policy gradient and of its baseline."""
    policy_entropy_loss_weight: float = 0.01

    def __post_init__(self) -> None:
        sizes = (
            "num_experts",
            "num_selected_experts",
            "train_capacity_factor",
            "eval_capacity_factor",
            "min_expert_capacity",
            "num_expert_groups",
            "num_selected_groups",
            "bias_update_rate",
            "sinkhorn_iterations",
            "auction_rounds",
            "peer_heads",
            "peer_query",
        )
        check_positive("moe", {name: getattr(self, name) for name in sizes})
        check_positive("moe", {f"experts_per_layer[{i}]": n for i, n in enumerate(self.experts_per_layer)})
        fractions = ("jitter_noise", "input_dropout", "expert_dropout", "second_expert_threshold")
        check_fraction("moe", {name: getattr(self, name) for name in fractions})
        check_choice("moe.dispatch", self.dispatch, ["gather", "einsum", "ragged"])
        orders = ["first_come", "token_by_token", "batch_prioritized", "random"]
        check_choice("moe.fill_order", self.fill_order, orders)
        check_choice("moe.hash_table", self.hash_table, ["random", "balanced", "clustered"])
        check_choice("moe.shared_mixing", self.shared_mixing, ["sum", "learned"])
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
            "load_balance_loss_weight",
            "router_z_loss_weight",
            "importance_loss_weight",
            "load_loss_weight",
            "policy_loss_weight",
            "policy_entropy_loss_weight",
            "no_token_left_behind",
            "num_shared_experts",
            "group_size",
            "expert_capacity",
        ):
            require(getattr(self, name) >= 0, f"moe.{name} must not be negative, got {getattr(self, name)}")

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
