"""From a conversation to the ids and media of a prompt."""
