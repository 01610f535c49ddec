"""Input of a terminal or a pipe: lines, their history, and Ctrl-C.

The history is kept in ``~/.local/state/mlx-onevision/history`` (or under ``$XDG_STATE_HOME``),
readable by its owner only. ``MLX_ONEVISION_HISTORY`` names another file; empty, none is kept.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from os.path import expanduser
from pathlib import Path

from mlx_onevision.errors import RequestError

HISTORY = "MLX_ONEVISION_HISTORY"
MAX_LINES = 1000


class History:
    """The lines typed before, the last one last. Errors of its file are ignored."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def lines(self) -> list[str]:
        """The last ``MAX_LINES`` of the file, which is cut to these when it has twice as many."""
        if self._path is None:
            return []
        try:
            found = self._path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        except OSError:
            return []
        kept = found[-MAX_LINES:]
        if len(found) >= 2 * MAX_LINES:
            shorter = self._path.with_name(f"{self._path.name}.{os.getpid()}")
            with suppress(OSError):
                _append(shorter, "".join(f"{line}\n" for line in kept))
                shorter.replace(self._path)
        return kept

    def add(self, line: str) -> None:
        """Writes a line at once, so that two conversations can share the file."""
        if self._path is not None and line.strip():
            with suppress(OSError, UnicodeError):
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                _append(self._path, f"{line}\n")


def history_path() -> Path | None:
    """The history's file; None for none."""
    named = os.environ.get(HISTORY)
    if named is not None:
        return Path(expanduser(named)) if named else None
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(expanduser(state)) / "mlx-onevision" / "history"


def line_reader() -> tuple[Callable[[], str], bool]:
    """A function that reads the next line, and whether stdin is a terminal: then with a prompt, and
    with editing and history where Python has readline.
    """
    if not sys.stdin.isatty():
        return _piped_line, False
    try:
        import readline  # input() uses it once it is there
    except ImportError:
        return _typed_line, True
    history = History(history_path())
    for line in history.lines():
        readline.add_history(line)

    def typed_line() -> str:
        line = _typed_line()
        history.add(line)
        return line

    return typed_line, True


def _append(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def _piped_line() -> str:
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    try:
        return line.decode("utf-8").rstrip("\r\n")
    except UnicodeError:
        raise RequestError("a line is not UTF-8 text; save it as UTF-8") from None


def _typed_line() -> str:
    prompt = "> "
    if not sys.stdout.isatty():  # answers only; without a terminal there is no line editing either
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        return input(prompt)
    except UnicodeError:
        raise RequestError("the line is not text in the terminal's encoding") from None


class Interrupts:
    """What Ctrl-C does at the moment, once; nothing where no action is set.

    Python raises KeyboardInterrupt wherever it happens to be, so that a second key press ends a
    program that has just caught the first. Without :meth:`handled` that is left as it is.
    """

    def __init__(self) -> None:
        self._action: Callable[[], object] | None = None

    @contextmanager
    def handled(self) -> Generator[None]:
        """Ctrl-C is handled by this object meanwhile; without effect outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._pressed)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def calling(self, action: Callable[[], object]) -> Generator[None]:
        """Ctrl-C calls ``action`` meanwhile, at most once."""
        self._action = action
        try:
            yield
        finally:
            self._action = None

    def raising(self) -> AbstractContextManager[None]:
        """Ctrl-C raises KeyboardInterrupt meanwhile, at most once."""
        return self.calling(_raise)

    def _pressed(self, *_: object) -> None:
        action, self._action = self._action, None
        if action is not None:
            action()


def _raise() -> None:
    raise KeyboardInterrupt
