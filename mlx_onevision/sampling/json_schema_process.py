"""The process that works through a stranger's schema: started by :mod:`schemas`, never imported.

llguidance has limits of its own, but where a schema cuts patterns or multiples with each other they
do not hold: a hundred characters take minutes and all memory, and a long chain of references
overflows the stack. So it is done here first, where it can die without harm.

Comes in on standard input: the schema. Goes out: a line of JSON, null or why it is refused.
"""

import json
import os
import sys
import threading

STACK = 1 << 20  # bytes; less than any thread has that will do the same again


class Bytes:
    """The smallest vocabulary there is: what is wrong with a schema does not depend on the
    words.
    """

    tokens = (*(bytes([byte]) for byte in range(256)), b"")
    eos_token_id = 256
    bos_token_id = None

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def main() -> None:
    request = json.loads(sys.argv[1])
    sys.path[:] = request["path"]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from mlx_onevision.subprocesses import confine

    confine(request["memory"], seconds=int(request["seconds"]) + 1)
    schema = sys.stdin.buffer.read().decode()

    def work() -> None:
        try:
            from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=request["options"])
            limits = LLParserLimits(**request["limits"])
            tokenizer = LLTokenizer(TokenizerWrapper(Bytes()), slices=[])
            matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
            if not matcher.is_error():
                matcher.compute_bitmask()
            error = matcher.get_error() if matcher.is_error() else None
        except Exception as refused:
            error = str(refused) or type(refused).__name__
        out.write(json.dumps(error))
        out.flush()

    threading.stack_size(STACK)
    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    os._exit(0)


if __name__ == "__main__":
    main()
