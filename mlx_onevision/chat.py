"""A conversation in a terminal: what is said, and the lines that a person types.

Answers go to ``show``; everything else that is printed (what was attached, counts, errors) goes to
``note``, so that a program at the other end of a pipe reads answers only.
"""

import json
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from os.path import expanduser
from pathlib import Path
from typing import Any, Unpack

from mlx_onevision.api import Model
from mlx_onevision.errors import OneVisionError, RequestError
from mlx_onevision.fetch import is_url
from mlx_onevision.generation import Generation, Usage
from mlx_onevision.image import load_image
from mlx_onevision.options import Options

HELP = """\
/image PATH   show the model a picture (a file or a URL), with the next message
/reset        forget the conversation and its pictures
/save FILE    write the conversation as JSON
/help         this
/exit         end, as Ctrl-D does

Anything else is a message; begin with a space where it begins with a slash.
Ctrl-C cancels an answer."""

# Reads a medium once, so that its file may change and its address need not be asked at every turn.
LOADERS: dict[str, Callable[[str], Any]] = {"image": load_image}


class Conversation:
    """The turns so far. Each answer reads only what is new: the model keeps the rest.

    options : settings of every answer, as for :meth:`Model.generate`.
    """

    def __init__(self, model: Model, **options: Unpack[Options]) -> None:
        self._model = model
        self._options = options
        self.reset()

    def reset(self) -> None:
        """Forgets everything that was said and attached."""
        self.messages: list[dict[str, Any]] = []
        """With the media themselves; :attr:`record` names where they came from."""
        self.record: list[dict[str, Any]] = []
        self._attached: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def attach(self, kind: str, source: str) -> None:
        """Puts a medium, a file or a URL, before the next message. Raises what reading it
        raises.
        """
        where = {"url": source} if is_url(source) else {"path": str(Path(source).absolute())}
        loaded = LOADERS[kind](source)
        self._attached.append(({"type": kind, kind: loaded}, {"type": kind, **where}))

    def say(self, text: str, show: Callable[[str], object]) -> Generation:
        """Sends a message, shows the pieces of the answer as they come, and returns it.

        Ctrl-C cancels it, and what had come by then becomes the answer; where nothing had, or where
        it fails, the conversation is as it was before.
        """
        said = {"type": "text", "text": text}
        media = [block for block, _ in self._attached]
        messages = [*self.messages, {"role": "user", "content": [*media, said]}]
        answer = self._model.stream(messages=messages, **self._options)
        try:
            with _on_interrupt(answer.cancel):
                for piece in answer:
                    show(piece)
                result = answer.result()
        except BaseException:
            answer.cancel()
            raise
        if result.finish_reason != "cancelled" or result.text:
            reply = {"role": "assistant", "content": [{"type": "text", "text": result.text}]}
            named = [block for _, block in self._attached]
            self.messages = [*messages, reply]
            self.record += [{"role": "user", "content": [*named, said]}, reply]
            self._attached = []
        return result

    def save(self, path: Path, replace: bool = False) -> None:
        """Writes the conversation as JSON; ``generate(messages=...)`` takes it.

        Raises:
            RequestError: for a file that is there, unless it is to be replaced.
            OSError: where it cannot be written.
        """
        try:
            with path.open("w" if replace else "x", encoding="utf-8") as file:
                json.dump(self.record, file, indent=2, ensure_ascii=False)
                file.write("\n")
        except FileExistsError:
            raise RequestError(f"{path} is there already; choose another name") from None


class Terminal:
    """Lines in, answers out.

    read : the next line; EOFError at the end, KeyboardInterrupt where the line was given up.
    interactive : whether a person types them, who may give a line up and go on.
    explain : an error as one sentence.
    verbose : note what each answer took.
    """

    def __init__(
        self,
        conversation: Conversation,
        read: Callable[[], str],
        show: Callable[[str], object],
        note: Callable[[str], object],
        explain: Callable[[Exception], str] = str,
        *,
        interactive: bool = True,
        verbose: bool = False,
    ) -> None:
        self._conversation = conversation
        self._read, self._show, self._note = read, show, note
        self._explain = explain
        self._interactive, self._verbose = interactive, verbose
        self._saved: set[Path] = set()
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": lambda argument: self._attach("image", argument),
            "/reset": self._reset,
            "/save": self._save,
            "/help": lambda _: self._help(),
        }

    def run(self) -> int:
        """Until the lines end, or ``/exit``. Returns how many of them failed."""
        failed = 0
        while True:
            try:
                line = self._read()
                if line.split()[:1] in (["/exit"], ["/quit"]):
                    return failed
                self._take(line)
            except EOFError:
                if self._interactive:
                    self._note("")  # below the prompt
                return failed
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                self._note("")  # below the line that was being typed, or that named a picture
            except BrokenPipeError:
                raise  # nobody reads the answers any more
            except (OneVisionError, OSError, MemoryError) as error:
                failed += 1
                self._note(f"error: {' '.join(self._explain(error).split())}")

    def _take(self, line: str) -> None:
        if not line.strip():
            return
        if not line.startswith("/"):
            self._say(line.strip())
            return
        name, _, argument = line.strip().partition(" ")
        if name not in self._commands:
            raise RequestError(f"there is no command {name}; /help lists them")
        self._commands[name](argument.strip())

    def _say(self, text: str) -> None:
        shown = False

        def show(piece: str) -> None:
            nonlocal shown
            shown = True
            self._show(piece)

        try:
            result = self._conversation.say(text, show)
        except Exception:
            if shown:
                self._show("\n")
            raise
        self._show("\n")
        if result.finish_reason == "cancelled":
            self._note("(cancelled)" if result.text else "(cancelled; the message is taken back)")
        elif result.finish_reason == "length":
            self._note("(cut off at --max-tokens, or at the end of the model's context)")
        if self._verbose:
            self._note(counts(result.usage))

    def _attach(self, kind: str, argument: str) -> None:
        if not argument:
            raise RequestError(f"/{kind} needs a file or a URL")
        source = path_of(argument)
        self._conversation.attach(kind, source)
        self._note(f"(the next message shows {source})")

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._note("(a new conversation)")

    def _save(self, argument: str) -> None:
        if not argument:
            raise RequestError("/save needs a file")
        path = Path(path_of(argument)).absolute()
        self._conversation.save(path, replace=path in self._saved)
        self._saved.add(path)
        self._note(f"(saved as {path})")

    def _help(self) -> None:
        self._note(HELP)


def line_reader() -> tuple[Callable[[], str], bool]:
    """What reads the lines, and whether a person types them: then with a prompt, and with editing
    and history where Python has readline.
    """
    if not sys.stdin.isatty():
        return _piped_line, False
    with suppress(ImportError):
        import readline  # noqa: F401  (input() uses it once it is there)
    return _typed_line, True


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


def counts(usage: Usage) -> str:
    """What an answer read, encoded and wrote, on one line."""
    read = usage.prompt_tokens - usage.cached_tokens
    return (
        f"[read {read} of {usage.prompt_tokens} tokens, {usage.cached_tokens} were in the cache; "
        f"encoded {usage.encoded_media} media in {usage.encode_seconds:.2f} s; "
        f"first token after {usage.prefill_seconds:.2f} s; "
        f"{usage.completion_tokens} tokens at {usage.tokens_per_second:.1f} tok/s]"
    )


@contextmanager
def _on_interrupt(cancel: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls ``cancel`` meanwhile, instead of raising; only the main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: cancel())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
