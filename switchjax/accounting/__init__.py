"""What a model costs on paper: parameters, FLOPs, bytes, published sizes, hardware."""
