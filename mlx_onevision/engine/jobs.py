"""What a model computes besides answers, each job in its turn, by its name: it can be sent to other
ranks.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from mlx_onevision.engine import pooling
from mlx_onevision.engine.request import as_package_error
from mlx_onevision.engine.runner import Runner
from mlx_onevision.errors import CancelledError
from mlx_onevision.media.video import no_check

JOBS: dict[str, Callable[..., Any]] = {
    "logits": lambda runner, check, inputs, last: runner.logits(inputs, last),
    "embed_tiles": lambda runner, check, tiles, table: pooling.tile_vectors(
        runner, tiles, table, check
    ),
    "embed_prompts": lambda runner, check, prompts: pooling.prompt_vectors(runner, prompts, check),
    "forget": lambda runner, check, keys: runner.forget(keys),
}


class Job:
    """One of :data:`JOBS`, with its arguments.

    wanted : called between steps; ends it by raising.
    """

    def __init__(
        self, name: str, arguments: list[Any], wanted: Callable[[], None] = no_check
    ) -> None:
        self.name, self.arguments = name, arguments
        self.in_turn = name != "forget"
        self.number = -1  # among ranks
        self.future: Future[Any] = Future()
        self._wanted = wanted
        self._refusal: Exception | None = None
        self._cancelled = threading.Event()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel_now(self) -> None:
        self._cancelled.set()

    def refused(self) -> bool:
        """Whether its caller does not want it any more."""
        try:
            if not self.future.running() and not self.future.set_running_or_notify_cancel():
                raise CancelledError("the request was cancelled")
            self._wanted()
        except Exception as error:
            self._refusal = self._refusal or error
        return self._refusal is not None

    def run(self, runner: Runner, check: Callable[..., None]) -> None:
        """``check`` : called between steps, and ends it by raising."""
        try:
            check()
            result = JOBS[self.name](runner, check, *self.arguments)
        except BaseException as error:
            runner.raise_if_alone(error)
            self.end(self._refusal or error)
        else:
            with suppress(Exception):
                self.future.set_result(result)

    def end(self, error: BaseException) -> None:
        with suppress(Exception):  # nobody waits, or it has its result
            self.future.set_exception(as_package_error(error))
