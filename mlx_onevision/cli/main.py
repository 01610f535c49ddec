"""The ``mlx-onevision`` command.

Results go to stdout and nothing else does; notices, progress and errors go to stderr. An error is
one sentence, never a traceback. Exit codes: 0, 1 (not done), 2 (wrong usage), 130 (Ctrl-C).

``--help`` and ``--version`` load click and nothing heavier: commands import the library.
"""

from __future__ import annotations

import io
import json
import sys
import traceback
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from mlx_onevision.cli.chat import chat
from mlx_onevision.cli.describe import describe
from mlx_onevision.cli.embed import embed
from mlx_onevision.cli.options import (
    DEBUG,
    debug_option,
    dtype_option,
    model_option,
    revision_option,
)
from mlx_onevision.errors import RequestError, sentence

if TYPE_CHECKING:
    from mlx_onevision.engine.generation import Usage

INTERRUPTED = 130


class ErrorsAsSentences(click.Group):
    """A group whose commands end in one line on stderr and an exit code, whatever they raise."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn what it raises into ``error: ...`` and an exit code."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own: usage (2), --help (0), a reader that closed the pipe (1, silent)
        except KeyboardInterrupt:
            click.echo(err=True)  # the answer may stand half way through a line
            ctx.exit(INTERRUPTED)
        except Exception as error:
            fail(ctx, error)


def fail(ctx: click.Context, error: Exception) -> NoReturn:
    """Print ``error`` as one sentence (after its traceback with ``--debug``) and exit with 1."""
    if ctx.meta.get(DEBUG):
        traceback.print_exception(error)
    line = " ".join(sentence(error).split()).removesuffix(".")
    click.echo(f"error: {line}", err=True)
    ctx.exit(1)


@click.group(cls=ErrorsAsSentences, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mlx-onevision", message="%(prog)s %(version)s")
def cli() -> None:
    """LLaVA-OneVision in MLX: ask a model about images and videos."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an answer may not fit the locale


@cli.command(short_help="Answer one prompt.")
@model_option
@click.option("--image", "images", multiple=True, metavar="FILE", help="An image: a file or a URL.")
@click.option("--video", "videos", multiple=True, metavar="FILE", help="A video: a file or a URL.")
@click.option(
    "--frames", type=int, metavar="N", help="N frames of a video, evenly spread. Default: 32."
)
@click.option("--fps", type=float, metavar="F", help="F frames of each second of a video instead.")
@click.option("--start", type=float, metavar="S", help="Begin S seconds into a video.")
@click.option("--end", type=float, metavar="S", help="End S seconds into a video.")
@click.option(
    "--tiling",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    help="Cut images into tiles. Default: an image that is alone.",
)
@click.option(
    "--prompt", required=True, metavar="TEXT", help="The question; - reads it from stdin."
)
@click.option("--system", metavar="TEXT", help="The system message.")
@click.option(
    "--max-tokens",
    type=int,
    help="The longest answer, in tokens. Default: the model's own, or 256.",
)
@click.option("--temperature", type=float, help="0 is greedy. Default: the model's own.")
@click.option("--top-p", type=float, help="Sample from the likeliest tokens of this total mass.")
@click.option("--top-k", type=int, help="Sample from this many likeliest tokens.")
@click.option("--min-p", type=float, help="Drop tokens below this part of the likeliest's chance.")
@click.option("--repetition-penalty", type=float, help="Above 1 makes repeated tokens less likely.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before TEXT.")
@click.option(
    "--json-schema",
    metavar="FILE",
    help="Answer with a document of this JSON Schema: a file, or the schema itself.",
)
@click.option(
    "--logprobs", type=int, metavar="N", help="With --json, tell the N likeliest tokens each time."
)
@click.option(
    "--stream/--no-stream", default=None, help="Print as it comes. Default: on a terminal."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--verbose", is_flag=True, help="Print counts, seconds and peak memory to stderr.")
@revision_option
@dtype_option
@click.option(
    "--quantize", type=click.Choice(["4", "8"]), help="Pack the weights while they are loaded."
)
@debug_option
def generate(
    model: str | None,
    images: tuple[str, ...],
    videos: tuple[str, ...],
    frames: int | None,
    fps: float | None,
    start: float | None,
    end: float | None,
    tiling: Literal["auto", "always", "never"],
    prompt: str,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repetition_penalty: float | None,
    seed: int | None,
    stop: tuple[str, ...],
    json_schema: str | None,
    logprobs: int | None,
    stream: bool | None,
    as_json: bool,
    verbose: bool,
    revision: str | None,
    dtype: str | None,
    quantize: str | None,
) -> None:
    """Answer one prompt, about images, videos or neither.

    \b
    mlx-onevision generate --image photo.jpg --prompt "What is this?"
    mlx-onevision generate --video clip.mp4 --frames 16 --prompt "What happens?"
    mlx-onevision generate --model 7b --image photo.jpg --prompt - < question.txt
    """
    if as_json and stream:
        raise click.UsageError(
            "--json prints one object when the answer is complete; drop --stream"
        )
    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs are printed by --json; add it")
    question = read_prompt(prompt)
    schema = None if json_schema is None else read_schema(json_schema)
    if model is None:
        click.echo(
            "No --model: the embedded demo model answers; it knows coloured shapes only.", err=True
        )
    live = not as_json and (sys.stdout.isatty() if stream is None else stream)

    from mlx_onevision.api import load

    loaded = load(
        "demo" if model is None else model,
        revision=revision,
        dtype=dtype,
        quantize=int(quantize) if quantize else None,
    )
    try:
        answer = loaded.stream(
            question,
            images=images,
            videos=videos,
            num_frames=frames,
            fps=fps,
            start=start,
            end=end,
            tiling=tiling,
            system=system,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            json_schema=schema,
            logprobs=logprobs,
        )
        try:
            for delta in answer:
                if live:
                    click.echo(delta, nl=False)
            result = answer.result()
        except BaseException:  # Ctrl-C, or a reader that closed the pipe: nobody waits any more
            answer.cancel()
            raise
    finally:
        loaded.close()
    if as_json:
        click.echo(json.dumps({**result.to_dict(), "model": loaded.name}))
    else:
        click.echo("" if live else result.text)
    if verbose:
        click.echo(report(result.usage), err=True)


def read_prompt(prompt: str) -> str:
    """The prompt itself, or all of stdin for ``-``; RequestError where it is not text."""
    try:
        if prompt == "-":
            return sys.stdin.buffer.read().decode("utf-8").rstrip("\r\n")
        prompt.encode("utf-8")  # an argument that is not UTF-8 arrives with lone surrogates
    except UnicodeError:
        raise RequestError("the prompt is not UTF-8 text; save it as UTF-8") from None
    return prompt


def read_schema(given: str) -> str:
    """The schema itself, or what is in the file of that name."""
    if given.lstrip().startswith("{"):
        return given
    try:
        with open(given, encoding="utf-8") as file:
            return file.read()
    except UnicodeError:
        raise RequestError(f"{given} is not UTF-8 text; save it as UTF-8") from None


def report(usage: Usage) -> str:
    """``--verbose``: tokens, seconds, tokens a second, peak memory (GB = 1e9 bytes)."""
    rows = [
        f"prompt   {usage.prompt_tokens} tokens"
        f" ({usage.media_tokens} of images and videos, {usage.cached_tokens} cached)",
        f"prepare  {usage.prepare_seconds:.3f} s",
        f"import   {usage.import_seconds:.3f} s",
        f"encode   {usage.encode_seconds:.3f} s",
        f"prefill  {usage.prefill_seconds:.3f} s, {usage.prompt_tokens_per_second:.1f} tok/s",
        f"answer   {usage.completion_tokens} tokens in {usage.decode_seconds:.3f} s,"
        f" {usage.tokens_per_second:.1f} tok/s",
        f"memory   {usage.peak_memory_bytes / 1e9:.3f} GB at the peak",
    ]
    return "\n".join(rows)


for command in (chat, describe, embed):
    debug_option(command)
    cli.add_command(command)


def main() -> None:
    """The console script."""
    cli(prog_name="mlx-onevision")
