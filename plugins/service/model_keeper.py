"""Keeps a model in memory while it is asked, and a while longer; standard library only."""

import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from mlx_onevision.plugins.contract.streams import Timer, background
from mlx_onevision.plugins.service.base import CLOSED


class Closable(Protocol):
    def close(self) -> None: ...


Model = TypeVar("Model", bound=Closable)

CLOSE_TIMEOUT = 10.0  # seconds that close() waits for what is in use or still loading


class ModelKeeper(Generic[Model]):
    """load : makes the model, on a thread of its own.
    keep_alive : seconds without a request after which it is freed; None for never.
    """

    def __init__(self, load: Callable[[], Model], keep_alive: float | None) -> None:
        background.start()
        self._load, self._keep_alive = load, keep_alive
        self._changed = threading.Condition()
        self._model: Model | None = None
        self._error: BaseException | None = None
        self._busy = False  # loading or freeing: never both, so that two are never in memory
        self._users = 0
        self._free_when_idle = False
        self._closed = False
        self._timer: Timer | None = None

    @property
    def current(self) -> Model | None:
        """The model, if it is in memory just now; to look at, not to use."""
        return self._model

    def acquire(self, check: Callable[[], None]) -> Model:
        """The model, loaded if need be. :meth:`release` belongs to it.

        check : raises when it is not wanted any more; see :meth:`wake`.

        Raises What loading raises, to everyone who waited for it; the next one tries again;
        PluginError: when the keeper has been closed.
        """
        with self._changed:
            # Who waits for it counts already: it must not be freed before they have it.
            self._users += 1
            try:
                return self._wait(check)
            except BaseException:
                self._users -= 1
                self._settle()
                raise

    def _wait(self, check: Callable[[], None]) -> Model:
        waited = False
        while True:
            check()
            if self._closed:
                raise CLOSED
            if self._model is not None:
                self._stop_timer()
                return self._model
            if not self._busy:
                if waited and self._error is not None:
                    raise self._error
                self._busy, self._error = True, None
                _start("mlx-onevision-load", self._run_load)
            waited = True
            self._changed.wait()

    def release(self) -> None:
        with self._changed:
            self._users -= 1
            self._settle()

    def unload(self) -> None:
        """Frees the model once nobody uses it or waits for it."""
        with self._changed:
            self._free_when_idle = self._model is not None
            self._settle()

    def close(self) -> None:
        """As :meth:`unload`, and for good. What is in use, or still loading, is waited for a while,
        and is freed when it ends.
        """
        with self._changed:
            self._closed = self._free_when_idle = True
            self._changed.notify_all()
            self._settle()
            self._changed.wait_for(lambda: self._model is None and not self._busy, CLOSE_TIMEOUT)

    def wake(self) -> None:
        """Has those who wait look at their ``check`` again."""
        with self._changed:
            self._changed.notify_all()

    # Under the lock.

    def _settle(self) -> None:
        if self._users or self._model is None:
            return
        if self._free_when_idle or self._keep_alive == 0:
            self._free()
        elif self._keep_alive is not None:
            self._stop_timer()
            timer = background.call_later(self._keep_alive, lambda: self._free_if_idle(timer))
            self._timer = timer

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _free(self) -> None:
        self._stop_timer()
        model, self._model = self._model, None
        self._busy, self._free_when_idle = True, False
        _start("mlx-onevision-free", self._run_free, model)

    # On other threads.

    def _free_if_idle(self, timer: Timer) -> None:
        with self._changed:
            if self._timer is timer and not self._users:
                self._free()

    def _run_load(self) -> None:
        model, failure = None, None
        try:
            model = self._load()
        except BaseException as error:
            failure = error
        with self._changed:
            self._model, self._error, self._busy = model, failure, False
            self._free_when_idle = self._closed
            self._settle()
            self._changed.notify_all()

    def _run_free(self, model: Model) -> None:
        try:
            model.close()
        finally:
            del model
            with self._changed:
                self._busy = False
                self._changed.notify_all()


def _start(name: str, target: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=target, args=arguments, name=name, daemon=True).start()
