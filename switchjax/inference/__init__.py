"""Evaluation on held-out text, and decoding."""
