"""A backend behind HTTP, as OpenAI's clients speak it. Needs the extra ``server``."""
