"""Layers, attention, the transformer stack and the families of models assembled from them."""
