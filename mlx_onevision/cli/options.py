"""The options that several commands take, each of them once: its names, values and meaning.

A command picks from ``TABLE`` by the names of its parameters, which are those of the library. What
it says otherwise, a default or a help text, it gives to :func:`option`. ``convert`` and the plugins
pick from it, too. An option of one command alone is declared there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, TypeVar, cast

import click
from click.shell_completion import CompletionItem

from mlx_onevision.cli.paths import could_be_file
from mlx_onevision.cli.values import Model, Number, Output, Plot, parse_split
from mlx_onevision.sampling.ranges import RANGES, Range

Command = TypeVar("Command", bound=Callable[..., Any])

DRAFT_TOKENS = 8
DEBUG = "mlx_onevision.debug"
COUNT = Range(ge=1, whole=True)
SECONDS = Range(ge=0)
SOME_SECONDS = Range(gt=0, le=7 * 24 * 3600)


@dataclass(frozen=True)
class Option:
    """An option, as :class:`click.Option` takes it.

    names : as they are typed, the usual one first. files : several values may stand behind it.
    """

    names: tuple[str, ...]
    help: str
    type: click.ParamType[Any, Any] | type | None = None
    metavar: str | None = None
    default: Any = None
    show_default: bool = False
    required: bool = False
    is_flag: bool | None = None
    multiple: bool = False
    files: bool = False
    callback: Callable[[click.Context, click.Parameter, Any], Any] | None = None


def _number(name: str, flag: str, metavar: str, text: str, allowed: Range | None = None) -> Option:
    return Option((flag,), text, Number(allowed or RANGES[name]), metavar)


TABLE: Mapping[str, Option] = {
    # What is asked.
    "images": Option(
        ("--image",),
        "Images: files, URLs, or - for stdin; several may follow.",
        click.Path(),
        "FILE...",
        files=True,
    ),
    "videos": Option(
        ("--video",),
        "Videos: files, URLs, or - for stdin; several may follow.",
        click.Path(),
        "FILE...",
        files=True,
    ),
    "prompt": Option(("--prompt", "-p"), "The question; - reads it from stdin.", str, "TEXT"),
    "system": Option(("--system",), "The system message.", str, "TEXT"),
    "num_frames": _number(
        "num_frames",
        "--frames",
        "N",
        "N frames of a video, evenly spread. Default: 32.",
        COUNT,
    ),
    "fps": _number("fps", "--fps", "F", "F frames of each second of a video instead.", Range(gt=0)),
    "start": _number("start", "--start", "S", "Begin S seconds into a video.", SECONDS),
    "end": _number("end", "--end", "S", "End S seconds into a video.", Range(gt=0)),
    "tiling": Option(
        ("--tiling",),
        "Cut images into tiles; auto: an image that is alone.",
        click.Choice(["auto", "always", "never"]),
        default="auto",
        show_default=True,
    ),
    # How it is answered.
    "max_tokens": Option(
        ("--max-tokens", "-m"),
        "The longest answer, in tokens.",
        Number(RANGES["max_tokens"], "; -m is --max-tokens, and a model is named by --model"),
        "N",
    ),
    "temperature": Option(
        ("--temperature", "--temp"),
        "0 is greedy. Default: the model's own.",
        Number(RANGES["temperature"]),
        "T",
    ),
    "top_p": _number(
        "top_p", "--top-p", "P", "Sample from the likeliest tokens of this total probability."
    ),
    "top_k": _number(
        "top_k", "--top-k", "K", "Sample from this many of the likeliest tokens; 0 for all."
    ),
    "min_p": _number(
        "min_p", "--min-p", "P", "Drop tokens below this part of the likeliest one's probability."
    ),
    "repetition_penalty": _number(
        "repetition_penalty",
        "--repetition-penalty",
        "R",
        "Above 1 makes repeated tokens less likely.",
    ),
    "presence_penalty": _number(
        "presence_penalty",
        "--presence-penalty",
        "A",
        "Above 0 makes tokens less likely that the answer holds.",
    ),
    "frequency_penalty": _number(
        "frequency_penalty",
        "--frequency-penalty",
        "A",
        "The same, for each time that the answer holds them.",
    ),
    "seed": _number("seed", "--seed", "N", "Makes sampling repeatable."),
    "stop": Option(
        ("--stop",), "End the answer before TEXT; may be given again.", str, "TEXT", multiple=True
    ),
    "prompt_lookup": replace(
        _number(
            "prompt_lookup",
            "--prompt-lookup",
            "N",
            "Try N tokens at once where the answer repeats a passage; the answer is the same.",
        ),
        default=0,
    ),
    "draft_model": Option(
        ("--draft-model",),
        "A smaller model that proposes tokens, which come faster; the answer is the same.",
        Model(),
        "MODEL",
    ),
    "draft_tokens": _number(
        "draft_tokens",
        "--draft-tokens",
        "N",
        f"It proposes N tokens at once, at most. Default: {DRAFT_TOKENS}.",
    ),
    "prompt_cache": Option(
        ("--prompt-cache",),
        "Begin with the KV cache in FILE, where there is one, and write it again at the end.",
        Output(),
        "FILE",
    ),
    # Which model, and how it is loaded.
    "model": Option(
        ("--model",),
        "A folder, a Hugging Face id, 0.5b, 7b, 72b or demo. Default: the embedded demo model.",
        Model(),
        "MODEL",
    ),
    "revision": Option(
        ("--revision",), "A branch, tag or commit of a Hugging Face model.", str, "REV"
    ),
    "dtype": Option(
        ("--dtype",),
        "Compute in this type. Default: the checkpoint's.",
        click.Choice(["float32", "float16", "bfloat16"]),
    ),
    "quantize": Option(
        ("--quantize",),
        "Quantize the weights to so many bits while they are loaded.",
        click.Choice([4, 8]),
    ),
    "memory_limit": _number(
        "memory_limit",
        "--memory-limit",
        "GB",
        "Use at most so much memory, weights included. Default: what the device should use.",
        Range(gt=0),
    ),
    "kv_bits": Option(
        ("--kv-bits",),
        "Keep keys and values quantized: less memory a token, no batches.",
        click.Choice([8, 4]),
    ),
    "visual_tokens": _number(
        "visual_tokens",
        "--visual-tokens",
        "SHARE",
        "Keep this share of the tokens of an image's tiles and of video frames. Default: 1.",
    ),
    "adapter": Option(
        ("--adapter",),
        "Apply an adapter, of mlx-onevision train, mlx-lm or PEFT: a folder or a Hub id.",
        click.Path(),
        "ADAPTER",
    ),
    "split": Option(
        ("--split",),
        "Under mlx.launch, divide the layers: by each machine's memory, or in these shares.",
        metavar="auto|N,N,…",
        callback=parse_split,
    ),
    # Of a server.
    "name": Option(("--name",), "What clients call the model. Default: its own name.", str, "NAME"),
    "timeout": _number("timeout", "--timeout", "S", "Seconds for one request.", SOME_SECONDS),
    "keep_alive": _number(
        "keep_alive",
        "--keep-alive",
        "S",
        "Free the model after S seconds without requests. Default: never.",
        SECONDS,
    ),
    "decoders": Option(
        ("--decoders",),
        "Processes at once that decode videos, and images of rare kinds.",
        Number(Range(ge=1, le=64, whole=True)),
        "N",
        default=2,
        show_default=True,
    ),
    "decoder_memory": Option(
        ("--decoder-memory",),
        "Of each of them.",
        Number(Range(ge=0.5, le=1000)),
        "GB",
        default=1.5,
        show_default=True,
    ),
    "decoder_seconds": Option(
        ("--decoder-seconds",),
        "Of each of them, and one more for every 50 MB of the file.",
        Number(Range(ge=1, le=24 * 3600)),
        "S",
        default=20,
        show_default=True,
    ),
    # What is written.
    "as_json": Option(("--json",), "Print one JSON object.", is_flag=True),
    "verbose": Option(
        ("--verbose",), "Print counts, seconds and peak memory to stderr.", is_flag=True
    ),
    "dry_run": Option(("--dry-run",), "Show what would be done; do nothing.", is_flag=True),
    "plot": Option(("--plot",), "Draw it.", Plot(), "FILE.png"),
    "sidecar": Option(
        ("--sidecar",),
        "Where what is done is kept. Default: the user's cache folder. For ranks of mlx.launch "
        "on several machines: on a disk that all share, at one path, with file locks (NFS, SMB).",
        click.Path(file_okay=False),
        "FOLDER",
    ),
}
FRAMES = ("num_frames", "fps", "start", "end")
SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "seed"),
)
SPECULATION = ("prompt_lookup", "draft_model", "draft_tokens")
LOADING = (
    *("revision", "dtype", "quantize", "memory_limit", "kv_bits", "visual_tokens", "adapter"),
)


_LIBRARY = re.compile(
    rf"(?<![\w./'-])({'|'.join(name for name in TABLE if '_' in name or name == 'fps')})(?![\w./'])"
)


def error_line(text: str, command: str | None, about: str = "") -> str:
    """What the library says is wrong, on one line, with the options of ``command`` in place of the
    library's arguments. It begins with what it is ``about`` unless it says that anyway.
    """
    text = " ".join(text.split())
    text = _LIBRARY.sub(lambda found: TABLE[found[1]].names[0], text)
    elsewhere = "" if command in ("generate", "chat", None) else "generate "
    for name in ("image", "video"):
        text = text.replace(f"(--{name}, {name}s=)", f"({elsewhere}--{name})")
    return text if about in text else f"{about}: {text}"


def option(name: str, **changes: Any) -> Callable[[Command], Command]:
    """Gives a command the option of ``TABLE`` for its parameter ``name``, with the fields of
    :class:`Option` that it says otherwise.
    """
    found = replace(TABLE[name], **changes)
    given = {key: value for key, value in vars(found).items() if value is not None}
    several = given.pop("files")
    names = given.pop("names")
    if several:
        given |= {"multiple": True, "cls": Files}
    return click.option(*names, name, **given)


def options(*names: str) -> Callable[[Command], Command]:
    """Gives a command these options as they stand in ``TABLE``."""

    def add(command: Command) -> Command:
        for name in reversed(names):
            command = option(name)(command)
        return command

    return add


def gathered(argument: str, *names: str) -> Callable[[Command], Command]:
    """The same, handed over together: the command's parameter ``argument`` is a dictionary of what
    was given for them, None included.
    """

    def add(command: Command) -> Command:
        @wraps(command)
        def gather(**given: Any) -> Any:
            return command(**{argument: {name: given.pop(name) for name in names}}, **given)

        return cast(Command, options(*names)(gather))

    return add


def decoding_options(command: Command) -> Command:
    """Give a command that serves others ``decoding``: arguments of ``MediaPolicy``."""

    @wraps(command)
    def named(*, decoding: dict[str, Any], **given: Any) -> Any:
        decoders, memory, seconds = decoding.values()
        policy = {"decoders": decoders, "memory": int(memory * 2**30), "seconds": seconds}
        return command(decoding=policy, **given)

    names = ("decoders", "decoder_memory", "decoder_seconds")
    return cast(Command, gathered("decoding", *names)(named))


def debug_option(command: Command) -> Command:
    """Give a command ``--debug``, which the group reads when the command has failed."""

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        ctx.meta[DEBUG] = value

    return click.option(
        "--debug",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=remember,
        help="Show the traceback of an error.",
    )(command)


class Files(click.Option):
    """An option behind which several files may stand; see :class:`TakesFiles`."""


class TakesFiles(click.Command):
    """A command without arguments of its own: files behind the first one of ``--image`` belong to
    it, too. A word that no option takes is refused, and taken for a file only if it can be one: it
    might be the question.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = list(self._with_option_each(ctx, args))
        if not ctx.resilient_parsing and not {*words} & {*ctx.help_option_names}:
            # Before anything that is missing: it may be this.
            _, rest, _ = self.make_parser(ctx).parse_args(list(words))
            if rest:
                ways = "files come behind --image or --video"
                if any(param.name == "prompt" for param in self.params):
                    ways += ", the question behind --prompt"
                raise click.UsageError(f"No option takes {rest[0]!r}; {ways}", ctx)
        return super().parse_args(ctx, words)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return super().shell_complete(ctx, incomplete) or [CompletionItem(incomplete, type="file")]

    def _with_option_each(self, ctx: click.Context, args: Sequence[str]) -> Iterator[str]:
        """The arguments with the option before each of its files."""
        flags = {flag for param in self.params if isinstance(param, Files) for flag in param.opts}
        flag: str | None = None  # whose files may come
        words = iter(args)
        for word in words:
            if flag is not None and could_be_file(word):
                yield from (flag, word)
                continue
            yield word
            if word == "--":
                break
            name, given, _ = word.partition("=")
            flag = name if name in flags else None
            if flag is not None and not given:
                value = next(words, "--")
                if value.startswith("--"):
                    raise click.UsageError(f"{flag} needs a FILE behind it", ctx)
                yield value
        yield from words
