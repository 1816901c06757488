"""The routers. To add one, write a function like those here and enter it in `ROUTERS`."""

from switchjax.moe.routers.token_choice import route_gshard, route_st_moe, route_switch, route_top_k
from switchjax.moe.routing import Router

ROUTERS: dict[str, Router] = {
    "switch": Router(route_switch, selected=(1,)),
    "top_k": Router(route_top_k),
    "gshard": Router(route_gshard, selected=(2,)),
    "st_moe": Router(route_st_moe, selected=(2,)),
}
