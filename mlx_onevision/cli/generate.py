"""``mlx-onevision generate``: one prompt in, its answer out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_onevision.cli.loading import (
    draft_tokens,
    load,
    model_or_demo,
    report_unused_filters,
    unused,
)
from mlx_onevision.cli.options import (
    FRAMES,
    LOADING,
    SAMPLING,
    SPECULATION,
    TABLE,
    TakesFiles,
    gathered,
    option,
    options,
)
from mlx_onevision.cli.paths import media_argument
from mlx_onevision.cli.ranks import share_model
from mlx_onevision.cli.values import Number
from mlx_onevision.distributed import TRAFFIC, launched
from mlx_onevision.errors import RequestError
from mlx_onevision.sampling.ranges import RANGES

if TYPE_CHECKING:
    from mlx_onevision.engine.generation import Usage


@click.command(cls=TakesFiles)
@options("model", "images", "videos", *FRAMES, "tiling")
@option("prompt", required=True)
@option("system")
@option("max_tokens", help="The longest answer, in tokens. Default: the model's own, or 256.")
@options(*SAMPLING, "stop")
@click.option(
    "--json-schema",
    metavar="FILE",
    help="Answer with a document of this JSON Schema: a file, or the schema itself.",
)
@click.option(
    "--logprobs",
    type=Number(RANGES["logprobs"]),
    metavar="N",
    help="With --json, the N likeliest tokens of each step.",
)
@options(*SPECULATION, "prompt_cache")
@click.option(
    "--stream/--no-stream", default=None, help="Print as it comes. Default: on a terminal."
)
@options("as_json", "verbose")
@gathered("loading", *LOADING)
@option("split")
def generate(
    model: str | None,
    prompt: str,
    json_schema: str | None,
    stream: bool | None,
    as_json: bool,
    verbose: bool,
    loading: dict[str, Any],
    split: str | tuple[float, ...] | None,
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
    if not options["videos"]:
        for name in FRAMES:
            if options[name] is not None:
                flag = TABLE[name].names[0]
                raise click.UsageError(f"{flag} is about videos; add --video FILE, or drop it")
    from_stdin = [prompt, *options["images"], *options["videos"]]
    if from_stdin.count("-") > 1:
        raise click.UsageError("stdin is one thing only; give '-' once")
    options["draft_tokens"] = draft_tokens(draft_model, options["draft_tokens"])
    refused = {
        "--prompt-cache": prompt_cache,
        "'-'": "-" in from_stdin,  # mlx.launch never ends stdin
        "--draft-model": draft_model,
        "--prompt-lookup": options["prompt_lookup"],
    }
    share_model(model, loading, refused, split)
    question = read_prompt(prompt)
    for kind in ("images", "videos"):
        options[kind] = tuple(map(media_argument, options[kind]))
    options["json_schema"] = None if json_schema is None else read_schema(json_schema)
    model = model_or_demo(model)
    live = not as_json and (sys.stdout.isatty() if stream is None else stream)

    loaded = load(model, draft_model=draft_model, **loading)
    try:
        report_unused_filters(options, loaded)
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
        if as_json:
            click.echo(json.dumps({**result.to_dict(), "model": loaded.name}))
        else:
            click.echo("" if live else result.text)
        if prompt_cache is not None:
            if held is not None and not result.usage.cached_tokens:
                click.echo(unused(held), err=True)
            loaded.save_prompt_cache(prompt_cache)
    finally:
        loaded.close()
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
