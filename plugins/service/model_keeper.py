"""Keeps a model in memory while it is asked, and a while longer; standard library only."""

import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from mlx_onevision.plugins.contract.errors import bad_request


class Closable(Protocol):
    def close(self) -> None: ...


Kept = TypeVar("Kept", bound=Closable)

PATIENCE_SECONDS = 10.0

CLOSED = bad_request("the backend has been closed", "open it again")


class ModelKeeper(Generic[Kept]):
    """load : makes the model, on a thread of its own.
    keep_alive : seconds without a request after which it is freed; None for never.
    """

    def __init__(self, load: Callable[[], Kept], keep_alive: float | None) -> None:
        self._load, self._keep_alive = load, keep_alive
        self._changed = threading.Condition()
        self._model: Kept | None = None
        self._error: BaseException | None = None
        self._busy = False  # loading or freeing: never both, so that two are never in memory
        self._users = 0
        self._wanted_gone = False
        self._closed = False
        self._timer: threading.Timer | None = None

    @property
    def loaded(self) -> bool:
        return self._model is not None

    @property
    def kept(self) -> Kept | None:
        """The model, if it is in memory just now; to look at, not to use."""
        return self._model

    def borrow(self, check: Callable[[], None]) -> Kept:
        """The model, loaded if need be. :meth:`give_back` belongs to it.

        check : raises when it is not wanted any more; see :meth:`wake`.

        Raises:
            What loading raises, to everyone who waited for it; the next one tries again.
            PluginError: when the keeper has been closed.
        """
        with self._changed:
            # Who waits for it counts already: it must not be freed before they have it.
            self._users += 1
            try:
                return self._awaited(check)
            except BaseException:
                self._users -= 1
                self._settle()
                raise

    def _awaited(self, check: Callable[[], None]) -> Kept:
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
                threading.Thread(
                    target=self._loading, name="mlx-onevision-load", daemon=True
                ).start()
            waited = True
            self._changed.wait()

    def give_back(self) -> None:
        with self._changed:
            self._users -= 1
            self._settle()

    def unload(self) -> None:
        """Frees the model once nobody uses it or waits for it."""
        with self._changed:
            self._wanted_gone = self._model is not None
            self._settle()

    def close(self) -> None:
        """As :meth:`unload`, and for good. What is in use, or still loading, is waited for a while,
        and is freed when it ends.
        """
        with self._changed:
            self._closed = self._wanted_gone = True
            self._changed.notify_all()
            self._settle()
            self._changed.wait_for(
                lambda: self._model is None and not self._busy, timeout=PATIENCE_SECONDS
            )

    def wake(self) -> None:
        """Has those who wait look at their ``check`` again."""
        with self._changed:
            self._changed.notify_all()

    # Under the lock.

    def _settle(self) -> None:
        if self._users or self._model is None:
            return
        if self._wanted_gone or self._keep_alive == 0:
            self._start_freeing()
        elif self._keep_alive is not None:
            self._stop_timer()
            self._timer = threading.Timer(self._keep_alive, self._idle)
            self._timer.daemon = True
            self._timer.start()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start_freeing(self) -> None:
        self._stop_timer()
        model, self._model = self._model, None
        self._busy, self._wanted_gone = True, False
        threading.Thread(
            target=self._freeing, args=(model,), name="mlx-onevision-free", daemon=True
        ).start()

    # On threads of their own.

    def _idle(self) -> None:
        with self._changed:
            if self._timer is threading.current_thread() and not self._users:
                self._start_freeing()

    def _loading(self) -> None:
        model, failure = None, None
        try:
            model = self._load()
        except BaseException as error:
            failure = error
        with self._changed:
            self._model, self._error, self._busy = model, failure, False
            self._wanted_gone = self._closed
            self._settle()
            self._changed.notify_all()

    def _freeing(self, model: Kept) -> None:
        try:
            model.close()
        finally:
            del model
            with self._changed:
                self._busy = False
                self._changed.notify_all()
