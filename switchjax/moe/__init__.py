"""Mixture of experts: the router decides, the dispatcher moves, the experts compute.

A router (`routing`) gives each slot of the experts' buffers (`slots`) a token; the dispatcher (`dispatch`) gathers the
tokens and brings the results back; `layer` puts them together, with the exchange between devices.
"""
