"""How the tokens of an answer are sampled, constrained to a schema, and turned into text."""
