"""``mlx-onevision generate``: one prompt in, its answer out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_onevision.cli.options import (
    dtype_option,
    memory_options,
    model_option,
    model_or_demo,
    prompt_cache_option,
    revision_option,
    seed_option,
    share,
    speculation_options,
    split_option,
    system_option,
    temperature_option,
    top_p_option,
    unused,
    video_options,
)
from mlx_onevision.distributed import TRAFFIC, launched
from mlx_onevision.errors import RequestError

if TYPE_CHECKING:
    from mlx_onevision.engine.generation import Usage


@click.command(short_help="Answer one prompt.")
@model_option
@click.option(
    *("--image", "images"),
    multiple=True,
    metavar="FILE",
    help="An image: a file, a URL, or - for stdin.",
)
@click.option(
    *("--video", "videos"),
    multiple=True,
    metavar="FILE",
    help="A video: a file, a URL, or - for stdin.",
)
@video_options
@click.option(
    "--tiling",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    help="Cut images into tiles. Default: an image that is alone.",
)
@click.option(
    "--prompt", required=True, metavar="TEXT", help="The question; - reads it from stdin."
)
@system_option
@click.option(
    "--max-tokens",
    type=int,
    help="The longest answer, in tokens. Default: the model's own, or 256.",
)
@temperature_option
@top_p_option
@click.option("--top-k", type=int, help="Sample from this many likeliest tokens.")
@click.option("--min-p", type=float, help="Drop tokens below this part of the likeliest's chance.")
@click.option("--repetition-penalty", type=float, help="Above 1 makes repeated tokens less likely.")
@seed_option
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before TEXT.")
@click.option(
    "--json-schema",
    metavar="FILE",
    help="Answer with a document of this JSON Schema: a file, or the schema itself.",
)
@click.option(
    "--logprobs", type=int, metavar="N", help="With --json, the N likeliest tokens of each step."
)
@speculation_options
@prompt_cache_option
@click.option(
    "--stream/--no-stream", default=None, help="Print as it comes. Default: on a terminal."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--verbose", is_flag=True, help="Print counts, seconds and peak memory to stderr.")
@revision_option
@dtype_option
@memory_options
@split_option
@click.option(
    "--quantize", type=click.Choice(["4", "8"]), help="Quantize the weights while they are loaded."
)
def generate(
    model: str | None,
    prompt: str,
    json_schema: str | None,
    stream: bool | None,
    as_json: bool,
    verbose: bool,
    revision: str | None,
    dtype: str | None,
    memory: dict[str, Any],
    split: str | tuple[float, ...] | None,
    quantize: str | None,
    draft_model: str | None,
    prompt_cache: Path | None,
    **options: Any,
) -> None:
    """Answer one prompt, about images, videos or neither.

    \b
    mlx-onevision generate --image photo.jpg --prompt "What is this?"
    mlx-onevision generate --video clip.mp4 --frames 16 --prompt "What happens?"
    mlx-onevision generate --model 7b --image photo.jpg --prompt - < question.txt
    mlx-onevision generate --image - --prompt "What is this?" < photo.jpg
    """
    if as_json and stream:
        raise click.UsageError(
            "--json prints one object when the answer is complete; drop --stream"
        )
    if options["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs are printed by --json; add it")
    from_stdin = [prompt, *options["images"], *options["videos"]]
    if from_stdin.count("-") > 1:
        raise click.UsageError("stdin is one thing only; give '-' once")
    settings = {
        "revision": revision,
        "dtype": dtype,
        "quantize": int(quantize) if quantize else None,
        **memory,
    }
    refused = {
        "--prompt-cache": prompt_cache,
        "'-'": "-" in from_stdin,  # mlx.launch never ends stdin
        "--draft-model": draft_model,
        "--prompt-lookup": options["prompt_lookup"],
    }
    share(model, settings, refused, split)
    question = read_prompt(prompt)
    from mlx_onevision.cli.terminal import media_argument

    for kind in ("images", "videos"):
        options[kind] = tuple(map(media_argument, options[kind]))
    options["json_schema"] = None if json_schema is None else read_schema(json_schema)
    model = model_or_demo(model)
    live = not as_json and (sys.stdout.isatty() if stream is None else stream)

    from mlx_onevision.api import load

    loaded = load(model, draft_model=draft_model, **settings)
    try:
        held = prompt_cache if prompt_cache and prompt_cache.exists() else None
        if held is not None:
            loaded.load_prompt_cache(held)
        answer = loaded.stream(question, **options)
        try:
            for delta in answer:
                if live:
                    click.echo(delta, nl=False)
            result = answer.result()
        except BaseException:  # Ctrl-C, or a reader that closed the pipe: nobody waits any more
            answer.cancel()
            raise
        if prompt_cache is not None:
            if held is not None and not result.usage.cached_tokens:
                click.echo(unused(held), err=True)
            loaded.save_prompt_cache(prompt_cache)
    finally:
        loaded.close()
    if as_json:
        click.echo(json.dumps({**result.to_dict(), "model": loaded.name}))
    else:
        click.echo("" if live else result.text)
    if verbose:
        click.echo(report(result.usage), err=True)
        if launched():
            click.echo(f"sent     {TRAFFIC.sent / 1e6:.3f} MB to other ranks", err=True)


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
    """The schema itself, or that of the file of that name."""
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
