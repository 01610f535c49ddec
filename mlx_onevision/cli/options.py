"""The options that several commands share, and what they mean."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from mlx_onevision.distributed import launched, rank

Command = TypeVar("Command", bound=Callable[..., Any])

DRAFT_TOKENS = 8
DEBUG = "mlx_onevision.debug"

model_option = click.option(
    "--model",
    metavar="MODEL",
    help="A folder, a Hugging Face id, 0.5b, 7b, 72b or demo. Default: the embedded demo model.",
)
revision_option = click.option(
    "--revision", metavar="REV", help="A branch, tag or commit of a Hugging Face model."
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Compute in this type. Default: the checkpoint's.",
)
system_option = click.option("--system", metavar="TEXT", help="The system message.")
temperature_option = click.option(
    "--temperature", type=float, help="0 is greedy. Default: the model's own."
)
top_p_option = click.option(
    "--top-p", type=float, help="Sample from the likeliest tokens of this total mass."
)
seed_option = click.option("--seed", type=int, help="Makes sampling repeatable.")


def video_options(command: Command) -> Command:
    """Give a command the options that say which frames of a video are shown."""
    options = (
        ("--frames", "num_frames", int, "N", "N frames of a video, evenly spread. Default: 32."),
        ("--fps", "fps", float, "F", "F frames of each second of a video instead."),
        ("--start", "start", float, "S", "Begin S seconds into a video."),
        ("--end", "end", float, "S", "End S seconds into a video."),
    )
    for flag, name, kind, metavar, text in reversed(options):
        command = click.option(flag, name, type=kind, metavar=metavar, help=text)(command)
    return command


def memory_options(command: Command) -> Command:
    """Give a command that loads a model ``memory``: arguments of ``load``, with the adapter."""

    @wraps(command)
    def merged(
        *,
        memory_limit: float | None,
        kv_bits: str | None,
        visual_tokens: float | None,
        adapter: str | None,
        **others: Any,
    ) -> Any:
        bits = None if kv_bits is None else int(kv_bits)
        memory = {"memory_limit": memory_limit, "kv_bits": bits, "visual_tokens": visual_tokens}
        return command(memory={**memory, "adapter": adapter}, **others)

    limit = click.option(
        "--memory-limit",
        type=click.FloatRange(min=0, min_open=True),
        metavar="GB",
        help="Use at most so much memory, weights included. Default: what the device should use.",
    )
    bits = click.option(
        "--kv-bits",
        type=click.Choice(["8", "4"]),
        help="Keep keys and values quantized: less memory a token, no batches.",
    )
    tokens = click.option(
        "--visual-tokens",
        type=click.FloatRange(0, 1, min_open=True),
        metavar="SHARE",
        help="Keep this share of the tokens of an image's tiles and of video frames. Default: 1.",
    )
    adapter = click.option(
        "--adapter",
        metavar="ADAPTER",
        help="Apply an adapter, of mlx-onevision train, mlx-lm or PEFT: a folder or a Hub id.",
    )
    return cast(Command, adapter(limit(bits(tokens(merged)))))


def decoder_options(command: Command) -> Command:
    """Give a command that serves others ``decoding``: arguments of ``MediaPolicy``."""

    @wraps(command)
    def merged(
        *, decoders: int, decoder_memory: float, decoder_seconds: float, **others: Any
    ) -> Any:
        decoding = {"decoders": decoders, "memory": int(decoder_memory * 2**30)}
        return command(decoding={**decoding, "seconds": decoder_seconds}, **others)

    processes = click.option(
        "--decoders",
        default=2,
        show_default=True,
        type=click.IntRange(1, 64),
        help="Processes at once that decode videos, and images of rare kinds.",
    )
    memory = click.option(
        "--decoder-memory",
        default=1.5,
        show_default=True,
        metavar="GB",
        type=click.FloatRange(0.5, 1000),
        help="Of each of them.",
    )
    seconds = click.option(
        "--decoder-seconds",
        default=20.0,
        show_default=True,
        metavar="S",
        type=click.FloatRange(1, 24 * 3600),
        help="Of each of them, and one more for every 50 MB of the file.",
    )
    return cast(Command, processes(memory(seconds(merged))))


def speculation_options(command: Command) -> Command:
    """Give a command ``draft_model``, an argument of ``load``, and ``prompt_lookup`` and
    ``draft_tokens``, which are those of an answer.
    """

    @wraps(command)
    def merged(*, draft_model: str | None, draft_tokens: int | None, **others: Any) -> Any:
        if draft_tokens is not None and draft_model is None:
            raise click.UsageError("--draft-tokens needs --draft-model; add it")
        if draft_tokens is None:
            draft_tokens = 0 if draft_model is None else DRAFT_TOKENS
        return command(draft_model=draft_model, draft_tokens=draft_tokens, **others)

    options = (
        click.option(
            "--prompt-lookup",
            type=int,
            default=0,
            metavar="N",
            help="Try N tokens at once where the answer repeats a passage; the answer is the same.",
        ),
        click.option(
            "--draft-model",
            metavar="MODEL",
            help="A smaller model that proposes tokens, which come faster; the answer is the same.",
        ),
        click.option(
            "--draft-tokens",
            type=int,
            metavar="N",
            help=f"It proposes N tokens at once, at most. Default: {DRAFT_TOKENS}.",
        ),
    )
    wrapped: Any = merged
    for option in reversed(options):
        wrapped = option(wrapped)
    return cast(Command, wrapped)


def parse_split(
    _ctx: click.Context, _param: click.Parameter, value: str | None
) -> str | tuple[float, ...] | None:
    if value is None:
        return None
    if not launched():
        raise click.BadParameter("one process has all layers; start several with mlx.launch")
    if value == "auto":
        return value
    try:
        shares = tuple(float(share) for share in value.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0 < share < float("inf") for share in shares):
        raise click.BadParameter(f"{value!r} is neither auto nor numbers above 0, as in 30,50")
    return shares


split_option = click.option(
    "--split",
    callback=parse_split,
    metavar="auto|N,N,…",
    help="Under mlx.launch, divide the layers: by each machine's memory, or in these shares.",
)
prompt_cache_option = click.option(
    "--prompt-cache",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Begin with the KV cache in FILE, where there is one, and write it again at the end.",
)


def unused(prompt_cache: Path) -> str:
    """What to say where a prompt had nothing of the cache that was read."""
    return f"{prompt_cache} was not used: the prompt does not begin with the conversation in it"


def debug_option(command: Command) -> Command:
    """Give a command ``--debug``, which the group reads when the command has failed."""

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        ctx.meta[DEBUG] = value

    option = click.option(
        "--debug",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=remember,
        help="Show the traceback of an error.",
    )
    return option(command)


def model_or_demo(model: str | None) -> str:
    """The model that ``--model`` names, or the demo model, with a notice on stderr."""
    if model is not None:
        return model
    click.echo(
        "No --model: the embedded demo model answers; it knows coloured shapes only.", err=True
    )
    return "demo"


def share(
    model: str | None,
    settings: dict[str, Any],
    refused: Mapping[str, object] | None = None,
    split: str | tuple[float, ...] | None = None,
) -> None:
    """Has the ranks of mlx.launch, where it has started this process, share the model: adds that to
    ``settings``, which ``load`` is given. The others compute what rank 0 does from here on, print
    nothing, and end when it has closed the model.

    refused : options that do not go with ranks, and what was given for them.

    Raises:
        click.UsageError: for one that was given.
    """
    if not launched():
        return
    for name, given in (refused or {}).items():
        if given not in (None, False, 0):
            raise click.UsageError(f"mlx.launch does not go with {name}; leave it out")
    settings |= {"sharded": True, "split": split}
    if rank():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all, and rank 0 decides

        from mlx_onevision.api import load

        load(model or "demo", **settings)
