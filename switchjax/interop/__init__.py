"""Reads and writes Hugging Face's files; starts models with experts from dense ones (upcycling)."""
