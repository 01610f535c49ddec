"""Compiles an untrusted JSON schema; runs in a process of its own, see
:class:`~mlx_onevision.subprocesses.BoundedProcess`.

llguidance has limits of its own, but where a schema intersects patterns or multiples with each
other they do not hold: a hundred characters take minutes and all memory, and a long chain of
references overflows the stack. So it is done here first, where it can die without harm.
"""

import threading
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

STACK = 1 << 20  # bytes; less than the threads have that compile the schema again


class Bytes:
    """A vocabulary of single bytes: whether a schema compiles does not depend on the tokens."""

    tokens = (*(bytes([byte]) for byte in range(256)), b"")
    eos_token_id = 256
    bos_token_id = None

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def answer(request: dict[str, Any]) -> str | None:
    """Why the schema is refused, as llguidance puts it; None where it is not."""
    errors: list[str | None] = []
    threading.stack_size(STACK)
    worker = threading.Thread(target=lambda: errors.append(_compile(**request)))
    worker.start()
    worker.join()
    return errors[0]


def _compile(schema: str, options: Any, limits: dict[str, Any]) -> str | None:
    try:
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=options)
        tokenizer = LLTokenizer(TokenizerWrapper(Bytes()), slices=[])
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**limits))
        if not matcher.is_error():
            matcher.compute_bitmask()
        return matcher.get_error() if matcher.is_error() else None
    except Exception as error:
        return str(error) or type(error).__name__
