"""Mixture of experts: the router decides, the dispatcher moves, the experts compute.

A router (`routers`) gives each slot of the experts' buffers (`slots`) a token, in the form that `routing` fixes; the
dispatcher (`dispatch`) gathers the tokens and brings the results back; `layer` puts them together, with the exchange
between devices (`exchange`). PEER (`peer`) and soft MoE (`soft`) do without slots of one token.
"""
