"""Decoding, scoring and evaluation of trained models."""
