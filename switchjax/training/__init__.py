"""Optimisers, the train step, checkpoints, metrics and the loop that runs them."""
