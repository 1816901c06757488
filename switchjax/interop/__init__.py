"""Weights from elsewhere: Hugging Face's files in and out, and dense models as the start of models with experts."""
