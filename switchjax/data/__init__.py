"""Text and images: sources, vocabularies, caches, objectives, packing and batches."""
