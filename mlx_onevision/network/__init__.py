"""The network: tower, projector and language model, and what they take of memory."""
