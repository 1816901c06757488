"""Text data: sources, vocabulary, token cache, span corruption, packing, batches."""
