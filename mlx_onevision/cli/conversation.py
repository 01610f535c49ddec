"""A conversation in a terminal: its messages, and the commands between them.

Answers go to ``show``; everything else that is printed (attachments, counts, errors) goes to
``note``, so that a program at the other end of a pipe reads answers only.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Unpack

from mlx_onevision.api import Model
from mlx_onevision.cli.loading import unused
from mlx_onevision.cli.options import error_line
from mlx_onevision.cli.paths import parse_path
from mlx_onevision.cli.terminal import Interrupts
from mlx_onevision.engine.generation import Generation, Stream, Usage
from mlx_onevision.engine.options import Options
from mlx_onevision.errors import OneVisionError, RequestError, sentence, short
from mlx_onevision.files import replacing
from mlx_onevision.media.frame_sampling import FrameOptions
from mlx_onevision.media.image import DecodedImage, load_image
from mlx_onevision.media.sources import is_url

HELP = """\
/image PATH   show the model an image (a file or a URL), with the next message
/video PATH   show it a video
/reset        forget the conversation, its images and videos
/save FILE    write the conversation as JSON
/help         this
/exit         end, as Ctrl-D does

Anything else is a message; begin with a space where it begins with a slash.
Ctrl-C cancels an answer."""

ALONE = ("/exit", "/quit", "/reset", "/help")  # commands that nothing follows


class Conversation:
    """The messages so far. The prefill of an answer skips what the model has in its prefix cache.

    options : settings of every answer, as for :meth:`Model.generate`.
    """

    def __init__(self, model: Model, **options: Unpack[Options]) -> None:
        given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
        self._frames = {name: given.pop(name) for name in FrameOptions.names() if name in given}
        FrameOptions(**self._frames)  # refused here, not at the first video
        self._model = model
        self._options = given
        self.reset()

    def reset(self) -> None:
        """Forgets all messages and attachments."""
        self.messages: list[dict[str, Any]] = []
        """With the media themselves; :attr:`record` names where they came from."""
        self.record: list[dict[str, Any]] = []
        self._attached: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._answer: Stream | None = None
        self._cancelled = self._answered = False

    def attach(self, kind: str, source: str, frames: Mapping[str, Any] | None = None) -> str:
        """Puts an image or a video, a file or a URL, before the next message, and describes what of
        it the model will see. It is read once. Raises what reading it raises.

        frames : of a video, instead of those of all.
        """
        frames = self._frames if frames is None else frames
        shown = short(source, 160)  # it may be a data URI
        if is_url(source) or source[:5].lower() == "data:":
            location = {"url": source}
        else:
            location = {"path": str(Path(source).expanduser().absolute())}
        if kind == "image":
            image = DecodedImage(load_image(source))
            self._attached.append(({"type": kind, kind: image}, {"type": kind, **location}))
            return shown
        block = {"type": kind, kind: source, **frames}
        (video,) = self._model.prepare([{"role": "user", "content": [block]}]).media
        number = len(video.tiles)
        # A default number of frames is kept, too: a saved conversation has it.
        chosen = frames if "fps" in frames else {**frames, "num_frames": number}
        self._attached.append(
            ({"type": kind, kind: video.tiles}, {"type": kind, **location, **chosen})
        )
        times = video.video.times if video.video else None
        span = f", from {times[0]:.1f} to {times[-1]:.1f} s" if times else ""
        return f"{number} frame{'s' * (number != 1)} of {shown}{span}"

    def cancel(self) -> None:
        """Ends the answer under way, from a signal handler or another thread."""
        self._cancelled = True
        if self._answer is not None:
            self._answer.cancel()

    def say(self, text: str, show: Callable[[str], object]) -> Generation:
        """Sends a message, shows the pieces of the answer as they come, and returns it.

        Where it is cancelled, the text so far becomes the answer; where there is none, or where it
        fails, the conversation is as it was before.
        """
        prompt = {"type": "text", "text": text}
        media = [block for block, _ in self._attached]
        messages = [*self.messages, {"role": "user", "content": [*media, prompt]}]
        self._cancelled = False
        answer = self._answer = self._model.stream(messages=messages, **self._options)
        if self._cancelled:
            answer.cancel()
        try:
            for piece in answer:
                show(piece)
            result = answer.result()
        except BaseException:
            answer.cancel()
            raise
        finally:
            self._answer = None
        if result.finish_reason != "cancelled" or result.text:
            self._add(text, result.text)
            self._answered = True
        return result

    def _add(self, text: str, answer: str) -> None:
        """A message, with what is attached, and its answer."""
        prompt = {"type": "text", "text": text}
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        for messages, place in ((self.messages, 0), (self.record, 1)):
            media = [blocks[place] for blocks in self._attached]
            messages += [{"role": "user", "content": [*media, prompt]}, reply]
        self._attached = []

    def resume(self, path: Path) -> None:
        """Goes on with the conversation that :meth:`keep` wrote, of which images and videos are
        read again. Raises what reading them, or the file, raises.
        """
        _, metadata = self._model.load_prompt_cache(path)
        record = json.loads(metadata.get("messages", "[]"))
        for question, answer in zip(record[::2], record[1::2], strict=True):
            *media, text = question["content"]
            for block in media:
                kind, source = block["type"], block.get("url") or block["path"]
                self.attach(kind, source, {n: block[n] for n in FrameOptions.names() if n in block})
            self._add(text["text"], answer["content"][0]["text"])

    def keep(self, path: Path) -> None:
        """Writes the conversation with its KV cache, where anything has been answered."""
        if self._answered:
            self._model.save_prompt_cache(path, {"messages": json.dumps(self.record)})

    def save(self, path: Path, replace: bool = False) -> None:
        """Writes the conversation as JSON; ``generate(messages=...)`` takes it.

        Raises:
            RequestError: for a file that exists, unless it is to be replaced.
            OSError: where it cannot be written; an older file is still whole then.
        """
        if not replace:
            try:
                path.open("x").close()
            except FileExistsError:
                raise RequestError(f"{path} is there already; choose another name") from None
        try:
            with replacing(path) as file:
                text = json.dumps(self.record, indent=2, ensure_ascii=False)
                file.write(f"{text}\n".encode())
        except BaseException:
            if not replace:
                path.unlink(missing_ok=True)  # it was made here, and is empty
            raise


class Terminal:
    """Lines in, answers out.

    read : the next line; EOFError at the end, KeyboardInterrupt where the line was given up.
    interactive : whether a person types them: Ctrl-C then gives up a line that is being typed or a
        file that is being read, or cancels an answer, and the conversation goes on.
    verbose : note tokens and times of each answer.
    resumed : the file that the conversation came from.
    """

    def __init__(
        self,
        conversation: Conversation,
        read: Callable[[], str],
        show: Callable[[str], object],
        note: Callable[[str], object],
        *,
        interactive: bool = True,
        verbose: bool = False,
        resumed: Path | None = None,
    ) -> None:
        self._conversation = conversation
        self._read, self._show, self._note = read, show, note
        self._interactive, self._verbose = interactive, verbose
        self._resumed = resumed
        self._saved: set[Path] = set()
        self._interrupts = Interrupts()
        self._commands: dict[str, Callable[[str], object]] = {
            "/image": lambda argument: self._attach("image", argument),
            "/video": lambda argument: self._attach("video", argument),
            "/reset": self._reset,
            "/save": self._save,
            "/help": lambda _: self._note(HELP),
        }

    def run(self) -> int:
        """Until the lines end, or ``/exit``. Returns how many of them failed."""
        with self._interrupts.handled() if self._interactive else nullcontext():
            return self._run()

    def _run(self) -> int:
        failed = 0
        while True:
            try:
                with self._interrupts.raising():
                    line = self._read()
                if line.rstrip() in ("/exit", "/quit"):
                    return failed
                self._take(line)
            except EOFError:
                if self._interactive:
                    self._note("")  # below the prompt
                return failed
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                self._note("")  # below the line that was being typed, or that named a file
            except BrokenPipeError:
                raise  # nobody reads the answers any more
            except (OneVisionError, OSError, MemoryError) as error:
                failed += 1
                self._note(f"error: {error_line(sentence(error), 'chat')}")

    def _take(self, line: str) -> None:
        if not line.strip():
            return
        if not line.startswith("/"):
            self._say(line.strip())
            return
        name, _, argument = line.strip().partition(" ")
        if argument and name in ALONE:
            raise RequestError(
                f"{name} stands alone on its line; type {name}, or begin with a space to send the "
                "line as a message"
            )
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
            with self._interrupts.calling(self._conversation.cancel):
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
        if self._resumed is not None and not result.usage.cached_tokens:
            self._note(f"({unused(self._resumed)})")
        self._resumed = None
        if self._verbose:
            self._note(counts(result.usage))

    def _attach(self, kind: str, argument: str) -> None:
        if not argument:
            raise RequestError(f"/{kind} needs a file or a URL")
        source = parse_path(argument)
        with self._interrupts.raising():
            shown = self._conversation.attach(kind, source)
        self._note(f"(the next message shows {shown})")

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._note("(a new conversation)")

    def _save(self, argument: str) -> None:
        if not argument:
            raise RequestError("/save needs a file")
        path = Path(parse_path(argument)).absolute()
        self._conversation.save(path, replace=path in self._saved)
        self._saved.add(path)
        self._note(f"(saved as {path})")


def counts(usage: Usage) -> str:
    """Tokens, media and seconds of an answer, on one line."""
    read = usage.prompt_tokens - usage.cached_tokens
    return (
        f"[read {read} of {usage.prompt_tokens} tokens, {usage.cached_tokens} were in the cache; "
        f"encoded {usage.encoded_media} media in {usage.encode_seconds:.2f} s; "
        f"first token after {usage.prefill_seconds:.2f} s; "
        f"{usage.completion_tokens} tokens at {usage.tokens_per_second:.1f} tok/s]"
    )
