"""``mlx-onevision chat``: lines, commands, Ctrl-C, and how it ends; in a pipe and at a terminal."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write
from click.testing import CliRunner, Result
from images import picture_file

from mlx_onevision.api import Model
from mlx_onevision.cli.conversation import HELP, Conversation, Terminal
from mlx_onevision.cli.main import cli

LONG = "one two three four five six seven eight nine ten " * 4
COMMAND = (sys.executable, "-m", "mlx_onevision", "chat")


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[None]:
    """Ctrl-C as in the foreground: tests in the background are started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# The terminal.


class Typist:
    """Types lines; what is raised instead of a line is raised."""

    interrupt_after = -1
    """After so many pieces of text, Ctrl-C is pressed twice."""

    def __init__(self, model: Model | None, **options: Any) -> None:
        self.shown, self.notes = "", []
        self.pieces: list[str] = []
        self.on_note: Callable[[], object] = lambda: None
        self._talk = Conversation(model or Silent(), **options)  # type: ignore[arg-type]

    def type(self, *lines: str | BaseException | Callable[[], str], **settings: Any) -> int:
        waiting = list(lines)

        def read() -> str:
            if not waiting:
                raise EOFError
            line = waiting.pop(0)
            if isinstance(line, BaseException):
                raise line
            return line if isinstance(line, str) else line()

        def show(piece: str) -> None:
            self.shown += piece
            self.pieces.append(piece)
            if len(self.pieces) == self.interrupt_after:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

        def note(line: str) -> None:
            self.notes.append(line)
            self.on_note()

        return Terminal(self._talk, read, show, note, **settings).run()


class Silent:
    """A model that must not be asked."""


def test_answers_are_shown_and_the_rest_is_noted(model: Model, tmp_path: Path) -> None:
    picture = picture_file(tmp_path / "new.png", 5)
    typist = Typist(model, max_tokens=5)
    file = tmp_path / "a talk.json"
    failed = typist.type(
        *(f"/image {picture}", "what is it", "", "  ", f"/save '{file}'", "where"),
        *(f"/save {file}", "/reset", " /exit", "/exit ", "never asked"),
        interactive=False,
        verbose=True,
    )
    assert failed == 0
    inputs = [{"type": "image", "path": str(picture)}, {"type": "text", "text": "what is it"}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": inputs}]
    first = model.generate(messages=messages, max_tokens=5).text
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "where"}]
    second = model.generate(messages=messages, max_tokens=5).text
    third = model.generate("/exit", max_tokens=5).text
    assert typist.shown == f"{first}\n{second}\n{third}\n"
    assert len(json.loads(file.read_text(encoding="utf-8"))) == 4
    read = [note for note in typist.notes if note.startswith("[read ")]
    assert "encoded 1 media" in read[0] and "encoded 0 media" in read[1]
    assert sum("cut off" in note for note in typist.notes) == 3


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("/image", "needs a file"),
        ("/image no/such.png", "such.png"),
        ("/image file:///x.png", "does not exist"),
        ("/video", "needs a file"),
        ("/save", "needs a file"),
        ("/paint", "/paint"),
        ("/exit now", "type /exit, or begin with a space"),
        ("/reset all", "/reset stands alone"),
    ],
)
def test_a_line_that_cannot_be_done_is_one_sentence(line: str, named: str) -> None:
    typist = Typist(None)
    assert typist.type(line, "/help", interactive=False) == 1
    error, help_ = typist.notes
    assert error.startswith("error: ") and named in error and "\n" not in error
    assert help_ == HELP and typist.shown == ""


def test_nothing_of_the_users_is_overwritten(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("dear diary")
    typist = Typist(None)
    assert typist.type(f"/save {mine}", f"/save {tmp_path}/no/x", f"/save {tmp_path}/x") == 2
    assert mine.read_text() == "dear diary"
    assert json.loads((tmp_path / "x").read_text()) == []


def test_an_interrupted_line_is_given_up_and_the_next_is_read(model: Model) -> None:
    typist = Typist(model, max_tokens=3)
    assert typist.type(KeyboardInterrupt(), "hello") == 0
    assert typist.shown.endswith("\n") and len(typist.shown) > 1
    with pytest.raises(KeyboardInterrupt):
        typist.type(KeyboardInterrupt(), "hello", interactive=False)


def test_an_answer_that_is_cancelled_is_kept_as_far_as_it_came(model: Model) -> None:
    typist = Typist(model, max_tokens=4000, temperature=2.0, seed=1)
    typist.interrupt_after = 3
    assert typist.type("hello", "/help") == 0
    text = typist.shown.removesuffix("\n")
    assert text.startswith("".join(typist.pieces[:3])) and len(typist.pieces) < 1000
    assert typist._talk.record[1]["content"][0]["text"] == text
    assert typist.notes == ["(cancelled)", HELP, ""]  # it goes on
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_a_pipe_an_interrupt_is_the_end(model: Model) -> None:
    typist = Typist(model, max_tokens=4000, temperature=2.0, seed=1)
    typist.interrupt_after = 3
    with pytest.raises(KeyboardInterrupt):
        typist.type("hello", "/help", interactive=False)
    assert typist.notes == [] and typist._talk.record == []
    assert model.generate("hello", max_tokens=1).tokens  # the answer has been cancelled


def test_however_often_it_is_pressed_it_goes_on(model: Model) -> None:
    """Ctrl-C while one is being answered to, and where there is nothing to interrupt."""
    typist = Typist(model, max_tokens=3)
    press = partial(signal.raise_signal, signal.SIGINT)
    typist.on_note = press

    def read() -> str:
        press()
        press()
        raise AssertionError("the line was not given up")

    assert typist.type(read, "hello", "/help", read, "/reset") == 0
    assert typist.notes[-2:] == ["(a new conversation)", ""] and HELP in typist.notes
    assert len(typist.shown) > 1


def test_an_answer_cancelled_before_its_first_word_is_taken_back(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = model.stream

    def cancelled(**given: Any) -> Any:
        busy = stream("hello", max_tokens=4000)  # so that the answer has not begun
        answer = stream(**given)
        answer.cancel()
        busy.cancel()
        return answer

    monkeypatch.setattr(model, "stream", cancelled)
    typist = Typist(model, max_tokens=4000)
    typist.type("hello")
    assert typist._talk.messages == []
    assert any("taken back" in note for note in typist.notes)


def test_a_reader_that_leaves_ends_it(model: Model) -> None:
    typist = Typist(model, max_tokens=3)

    def gone(_: str) -> None:
        raise BrokenPipeError

    terminal = Terminal(typist._talk, lambda: "hello", gone, lambda _: None)
    with pytest.raises(BrokenPipeError):
        terminal.run()


# The command.


def run(*arguments: str | Path, stdin: bytes) -> Result:
    return CliRunner().invoke(cli, ["chat", *map(str, arguments)], input=stdin)


def test_a_conversation_goes_on_in_another_process(
    folder: Path, pictures: tuple[Path, Path], tmp_path: Path
) -> None:
    file, given = tmp_path / "kept", ("--max-tokens", "8", "--model", folder)
    lines = [f"/image {pictures[0]}", LONG, LONG]

    def talk(lines: list[str], *more: str) -> Result:
        return run(*given, *more, stdin="\n".join(lines).encode())

    whole = talk(lines)
    kept = ("--prompt-cache", str(file), "--verbose")
    command, said = [*COMMAND, *map(str, given), *kept], "\n".join(lines[:2])
    first = subprocess.run(command, input=said, capture_output=True, text=True, cwd=tmp_path)
    second = talk(lines[2:], *kept)
    assert first.stdout + second.stdout == whole.stdout
    assert "encoded 1 media" in first.stderr and "encoded 0 media" in second.stderr
    talk([f"/save {tmp_path / 'all.json'}"], *kept)
    assert len(json.loads((tmp_path / "all.json").read_text())) == 4
    other = talk([LONG], *kept, "--system", LONG)
    assert "was not used" in other.stderr and other.exit_code == 0


def test_lines_from_a_pipe(folder: Path, model: Model, pictures: tuple[Path, Path]) -> None:
    common = ("--model", folder, "--image", pictures[0], "--max-tokens", "5")
    done = run(*common, stdin=b"what is it\ncaf\xe9\n/reset\nhello")
    first = model.generate("what is it", images=[pictures[0]], max_tokens=5).text
    second = model.generate("hello", max_tokens=5).text
    assert done.stdout == f"{first}\n{second}\n"
    assert done.exit_code == 1 and "error: a line is not UTF-8" in done.stderr
    assert run("--model", folder, stdin=b"").exit_code == 0
    missing = run("--model", folder, "--image", "no.png", stdin=b"hello")
    assert missing.exit_code == 1 and missing.stdout == ""
    assert missing.stderr.startswith("error: ") and missing.stderr.count("\n") == 1


# A program that gives its arguments, a command, a terminal of their own. Not done here: a process
# with threads should not fork.
ON_A_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


def default_sigint() -> None:
    """A process that is started in the background ignores Ctrl-C, and hands that on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Screen:
    """The command on a terminal."""

    def __init__(self, *arguments: str | Path, history: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", ON_A_TERMINAL, *COMMAND, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TERM": "dumb", "MLX_ONEVISION_HISTORY": str(history)},
            preexec_fn=default_sigint,
            bufsize=0,
        )
        self.text = ""

    def wait(self, holds: Callable[[str], bool], insisting: str = "") -> str:
        """What comes until it ``holds`` of all that came since the last call.

        insisting : typed, and again whenever nothing has come for a while: a machine may be slow,
            and Python may notice a Ctrl-C only at the next key.
        """
        assert self._process.stdout is not None
        came, until = "", time.monotonic() + 60
        self.type(insisting)
        while not holds(came):
            ready, _, _ = select.select([self._process.stdout], [], [], 3)
            if not ready and time.monotonic() < until:
                self.type(insisting)
                continue
            if not ready:
                self._process.kill()
            piece = self._process.stdout.read(4096)
            if not piece:
                self.text += came
                assert self._process.wait(60) == 0, self.text
                break
            came += piece.decode(errors="replace")
        self.text += came
        return came

    def interrupt(self, holds: Callable[[str], bool]) -> None:
        """Presses Ctrl-C until it ``holds``, and waits until every one of them has been noticed,
        which they are before a line is.
        """
        self.wait(holds, insisting="\x03")
        self.wait(lambda came: "no command /probe" in came, insisting="/probe\n")

    def type(self, keys: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(keys.encode())

    def end(self) -> int:
        """Presses Ctrl-D until it ends; between two lines a terminal keeps none for the next."""
        with self._process, suppress(BrokenPipeError):
            self.wait(lambda _: False, insisting="\x04")
        return self._process.wait(60)


def test_a_person_at_a_terminal(tmp_path: Path) -> None:
    folder = write(tmp_path / "endless")
    (folder / "generation_config.json").write_text("{}")  # nothing ends an answer
    history = tmp_path / "state" / "history"
    options = ("--model", folder, "--max-tokens", "30000", "--temperature", "3")
    screen = Screen(*options, history=history)
    screen.wait(lambda came: came.endswith("> "))
    screen.type("half a line")
    screen.wait(lambda came: came.endswith("half a line"))  # now it reads
    screen.interrupt(lambda came: came.endswith("> "))  # gives the line up
    screen.type("go on\n")
    screen.wait(lambda came: len(came) > 300)
    screen.interrupt(lambda came: "(cancelled)" in came)  # and an answer
    screen.wait(
        lambda came: "/save FILE" in came, insisting="/hepl\x7f\x7flp\n"
    )  # it can be edited
    assert screen.end() == 0
    assert "Traceback" not in screen.text
    lines = history.read_text().splitlines()
    assert lines[-1] == "/help" and "go on" in lines and "half a line" not in lines
    assert history.stat().st_mode & 0o777 == 0o600
    again = Screen("--model", folder, history=history)
    again.wait(lambda came: came.endswith("> "))
    again.wait(lambda came: "/save FILE" in came, insisting="\x10\n")  # the line before
    assert again.end() == 0
