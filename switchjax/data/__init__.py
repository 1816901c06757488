"""Text and images: sources, vocabulary, caches, objectives, packing, batches."""
