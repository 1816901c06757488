"""Accounting and comparison of models and runs."""
