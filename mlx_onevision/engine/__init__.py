"""The inference thread: requests from any thread, answered in batches, and embeddings."""
