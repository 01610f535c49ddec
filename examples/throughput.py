"""Tokens a second of a server, for one stream and for several at once; standard library only.

python examples/throughput.py [URL [STREAMS [TOKENS]]]

Each stream asks until it has got so many tokens; reading the prompts is part of the time.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen

QUESTION = "Tell a very long story about number {}, and do not leave anything out."


def answer(url: str, text: str, tokens: int) -> int:
    """Asks once, reads the answer as it comes, and returns how many tokens it had."""
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens}
    body |= {"temperature": 1.0, "stream": True, "stream_options": {"include_usage": True}}
    headers = {"Content-Type": "application/json"}
    asked = Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urlopen(asked) as reply:
        lines = [line[6:] for line in reply if line.startswith(b"data: {")]
    return json.loads(lines[-1])["usage"]["completion_tokens"]


def speed(url: str, streams: int, tokens: int) -> float:
    """Tokens a second of all streams together."""

    def stream(number: int) -> int:
        got = 0
        while got < tokens:
            got += answer(url, QUESTION.format(f"{number}, {got}"), tokens - got)
        return got

    began = time.perf_counter()
    with ThreadPoolExecutor(streams) as pool:
        total = sum(pool.map(stream, range(streams)))
    return total / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000", help="%(default)s")
    parser.add_argument("streams", nargs="?", type=int, default=8, help="at once; %(default)s")
    parser.add_argument("tokens", nargs="?", type=int, default=256, help="of each; %(default)s")
    given = parser.parse_args()
    try:
        speed(given.url, 1, 16)  # the first request loads the model
        one = speed(given.url, 1, given.tokens)
        many = speed(given.url, given.streams, given.tokens)
    except (OSError, ValueError) as error:  # nobody is there, or what is given is no address
        parser.error(f"{given.url}: {error}; start a server with: mlx-onevision serve")
    print(f"1 stream:  {one:8.1f} tokens/s")
    print(f"{given.streams} streams: {many:8.1f} tokens/s, {many / one:.2f} times as many")


if __name__ == "__main__":
    main()
