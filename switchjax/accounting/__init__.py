"""The costs of a model on paper: parameters, FLOPs, bytes, published sizes, hardware."""
