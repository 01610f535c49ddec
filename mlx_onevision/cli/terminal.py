"""Lines that a person types, or that come from a pipe, and the ones typed before.

The lines of a person are kept from one conversation to the next, as shells keep theirs: in
``~/.local/state/mlx-onevision/history`` (or under ``$XDG_STATE_HOME``), for nobody else to read.
``MLX_ONEVISION_HISTORY`` names another file; empty, it keeps none.
"""

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from os.path import expanduser
from pathlib import Path

from mlx_onevision.errors import RequestError
from mlx_onevision.media.sources import is_url

# Ctrl-C in a program that goes on afterwards.
#
# Python raises KeyboardInterrupt wherever it happens to be, and so a key pressed twice ends a
# program that had just caught the first. Here Ctrl-C does what is said for the moment, once, and
# where nothing is said, nothing.


class Interrupts:
    """What Ctrl-C does now. Without :meth:`handled` it is as Python has it."""

    def __init__(self) -> None:
        self._action: Callable[[], object] | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Ctrl-C is left to this object meanwhile; only the main thread may say so."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._pressed)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def calling(self, action: Callable[[], object]) -> Iterator[None]:
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


HISTORY = "MLX_ONEVISION_HISTORY"
MOST_LINES = 1000


class History:
    """The lines typed before, the last of them last. A file that cannot be kept is not kept."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def lines(self) -> list[str]:
        """The last lines of the file, which is cut to so many when it has twice that."""
        if self._path is None:
            return []
        try:
            found = self._path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        except OSError:
            return []
        kept = found[-MOST_LINES:]
        if len(found) >= 2 * MOST_LINES:
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
    """Where the lines are kept; None for nowhere."""
    named = os.environ.get(HISTORY)
    if named is not None:
        return Path(expanduser(named)) if named else None
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(expanduser(state)) / "mlx-onevision" / "history"


def line_reader() -> tuple[Callable[[], str], bool]:
    """What reads the lines, and whether a person types them: then with a prompt, and with editing
    and history where Python has readline.
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


def path_of(argument: str) -> str:
    """What a person means by the rest of a line: a path as it is, or as a shell or a dropped file
    writes it, with quotes or backslashes.
    """
    if is_url(argument) or Path(expanduser(argument)).exists():
        return argument if is_url(argument) else expanduser(argument)
    try:
        words = shlex.split(argument)
    except ValueError:  # an apostrophe in a name
        words = []
    return expanduser(words[0] if len(words) == 1 else argument)
