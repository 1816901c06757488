"""Mixture of experts: the router decides, the dispatcher moves, the experts compute.

A router (`routers`) gives each slot of the experts' buffers (`capacity`) a token, in the form that `routing` defines.
The dispatcher (`dispatch`) gathers the tokens and brings the results back. `layer` joins them with the exchange between
devices (`expert_parallel`). PEER (`peer`) and soft MoE (`soft`) have no slots that hold one token.
"""
