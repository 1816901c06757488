"""The routers. To add one, write a function like those here and enter it in `ROUTERS`."""

from switchjax.moe.routers.balanced import base_router, route_base, route_sinkhorn
from switchjax.moe.routers.expert_choice import check_expert_choice, route_expert_choice
from switchjax.moe.routers.hash import hash_router, route_hash
from switchjax.moe.routers.hierarchical import check_hierarchy, hierarchical_router, route_hierarchical
from switchjax.moe.routers.noisy import noisy_router, route_noisy_top_k, route_v_moe
from switchjax.moe.routers.reinforced import reinforced_router, route_reinforced
from switchjax.moe.routers.sigmoid import check_sigmoid, route_sigmoid, sigmoid_router
from switchjax.moe.routers.token_choice import route_gshard, route_st_moe, route_switch, route_top_k
from switchjax.moe.routing import Router

_EXPERTS_CHOOSE = "an expert that takes a later token has no room for an earlier one"

ROUTERS: dict[str, Router] = {
    "switch": Router(route_switch, selected=(1,)),
    "top_k": Router(route_top_k),
    "gshard": Router(route_gshard, selected=(2,)),
    "st_moe": Router(route_st_moe, selected=(2,)),
    "noisy_top_k": Router(route_noisy_top_k, noisy_router),
    "v_moe": Router(route_v_moe),
    "hierarchical": Router(route_hierarchical, hierarchical_router, check=check_hierarchy),
    "sigmoid": Router(route_sigmoid, sigmoid_router, check=check_sigmoid),
    "expert_choice": Router(route_expert_choice, selected=(1,), noncausal=_EXPERTS_CHOOSE, check=check_expert_choice),
    "hash": Router(route_hash, hash_router, selected=(1,)),
    "base": Router(route_base, base_router, selected=(1,)),
    "sinkhorn": Router(route_sinkhorn, selected=(1,)),
    "reinforced": Router(route_reinforced, reinforced_router, selected=(1,)),
}
