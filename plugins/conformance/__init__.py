"""Whether a backend keeps the contract: a suite to run with pytest against one of your own.

    # test_mine.py
    from mlx_onevision.plugins.conformance import BackendConformance

    class TestMine(BackendConformance):
        video = Path("some.mp4").read_bytes()      # if it takes videos

        @classmethod
        def open_backend(cls):
            return MyBackend("http://127.0.0.1:8000")

pytest (9 or newer) then runs every test of the suite on what ``open_backend`` returns.
:class:`~.subject.Subject` has what can be set. A backend that can be opened by its name needs no
file: :mod:`plugin` runs the suite on it from the command line.

What a backend does not claim among the capabilities of its ``info()`` must be refused, and is not
tested beyond that. It covers: round trips through JSON; that a stream is the whole, in order; text
of every script; media; logprobs; schemas; vectors; cancellation before, while and after;
timeouts; threads, asyncio and crowds; errors, which concern one request only; memory given back;
the end of the backend.
"""

import pytest

for _part in ("answers", "lifecycle", "subject"):
    pytest.register_assert_rewrite(f"{__name__}.{_part}")

from mlx_onevision.plugins.conformance.answers import (  # noqa: E402
    Answers,
    Embeddings,
    LogprobsAndSchemas,
    Videos,
)
from mlx_onevision.plugins.conformance.lifecycle import Cancellation, Concurrency  # noqa: E402
from mlx_onevision.plugins.conformance.subject import Subject  # noqa: E402

__all__ = ["BackendConformance", "Subject"]


class BackendConformance(
    Answers, LogprobsAndSchemas, Embeddings, Videos, Cancellation, Concurrency
):
    """All of it; see the module."""
