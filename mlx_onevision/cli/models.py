# pyright: reportUnknownMemberType=false
"""``mlx-onevision models``: the models in the Hub's cache, downloaded and removed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_onevision.cli.options import option
from mlx_onevision.cli.values import Number
from mlx_onevision.errors import OneVisionError, RequestError
from mlx_onevision.sampling.ranges import Range

if TYPE_CHECKING:
    from mlx_onevision.checkpoint.load import OpenedCheckpoint

GIBIBYTE = 1 << 30
SHORT_COMMIT = 8  # hex digits of a commit in the table, and enough to name it


@dataclass(frozen=True)
class CachedModel:
    """A revision of a repository in the cache.

    refs : branches and tags that name it. disk_bytes : of its files, which other revisions may
        share. problem : why it cannot be loaded as it is; None where it can.
    layout : "hub", "original" or "mlx"; the rest is None, too, where the model cannot be loaded.
    context : tokens of the longest prompt with an image, and its answer, that fit into the memory;
        0 where not even a question about one image does.
    """

    repository: str
    revision: str
    refs: tuple[str, ...]
    disk_bytes: int
    folder: str
    problem: str | None
    layout: str | None = None
    weights: str | None = None
    weight_bytes: int | None = None
    context: int | None = None

    @property
    def line(self) -> tuple[str, ...]:
        """Its row of the table."""
        refs = ",".join(self.refs) or self.revision[:SHORT_COMMIT]
        name = (self.repository, refs, _size(self.disk_bytes))
        if self.problem is not None:
            return (*name, f"not usable: {self.problem}")
        fits = f"fits, with {self.context:,} tokens" if self.context else "does not fit"
        return (*name, f"{self.weights}, {self.layout} layout; {fits}")


@click.group(invoke_without_command=True)
@click.option(
    "--memory",
    type=Number(Range(ge=1, whole=True)),
    metavar="GB",
    help="Say what fits a Mac of so much memory. Default: this machine.",
)
@option("as_json", help="Print one JSON object a model, as a list.")
@click.pass_context
def models(ctx: click.Context, memory: int | None, as_json: bool) -> None:
    """List the LLaVA-OneVision models in the Hub's cache: their revision, size on disk, bits and
    layout, and with how long a prompt they fit into the memory.

    \b
    mlx-onevision models
    mlx-onevision models --memory 16
    mlx-onevision models pull 0.5b
    mlx-onevision models rm 0.5b
    """
    if ctx.invoked_subcommand is not None:
        if memory is not None or as_json:
            option = "--json" if as_json else "--memory"
            raise click.UsageError(f"{option} is for the list; leave it out, or name no command")
        return
    found, others = list_models(usable(memory))
    if as_json:
        click.echo(json.dumps([asdict(model) for model in found], indent=2))
        return
    rows = [model.line for model in found]
    widths = [max(map(len, column)) for column in zip(*(row[:3] for row in rows), strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[3]]))
    if not found:
        click.echo("No model is in the cache; type: mlx-onevision models pull 0.5b", err=True)
    if others:
        click.echo(f"{others} more in the cache are no LLaVA-OneVision models.", err=True)


@models.command(short_help="Download a model, or what is missing of it.")
@click.argument("model", metavar="MODEL")
@option("revision")
def pull(model: str, revision: str | None) -> None:
    """Download MODEL (a Hugging Face id, 0.5b, 7b or 72b), or what is missing of it, and print its
    folder. What a broken download has fetched is kept.
    """
    from mlx_onevision.checkpoint import hub
    from mlx_onevision.checkpoint.load import open_checkpoint

    _repository(model)
    folder = hub.resolve(model, revision)
    open_checkpoint(folder)
    click.echo(folder)


@models.command(short_help="Remove a model from the cache.")
@click.argument("model", metavar="MODEL")
@option("revision", help="Only this branch, tag or commit of it.")
@click.option("--yes", is_flag=True, help="Do not ask first.")
def rm(model: str, revision: str | None, yes: bool) -> None:
    """Remove MODEL (a Hugging Face id, 0.5b, 7b or 72b) from the cache, with all its revisions."""
    from huggingface_hub import scan_cache_dir

    repository = _repository(model)
    cache = scan_cache_dir(_cache_folder()) if _cache_folder().is_dir() else None
    here = [r for r in cache.repos if r.repo_id == repository] if cache is not None else []
    here = [one for one in here if one.repo_type == "model"]
    revisions = [found for one in here for found in one.revisions]
    if cache is None or not revisions:
        raise RequestError(
            f"{repository} is not in the cache; 'mlx-onevision models' lists what is"
        )
    commits = [
        found.commit_hash
        for found in revisions
        if revision is None
        or revision in found.refs
        or (len(revision) >= SHORT_COMMIT and found.commit_hash.startswith(revision))
    ]
    if not commits:
        names = sorted(name for one in revisions for name in one.refs or [one.commit_hash])
        raise RequestError(
            f"revision {revision} of {repository} is not in the cache, only {', '.join(names)}; "
            f"type: mlx-onevision models rm {model} --revision {names[0]}"
        )
    removal = cache.delete_revisions(*commits)
    freed = _size(removal.expected_freed_size)
    what = repository if revision is None else f"revision {revision} of {repository}"
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError(f"This would remove {what} ({freed}); add --yes")
        click.confirm(f"Remove {what} ({freed})?", abort=True, err=True)
    removal.execute()
    click.echo(f"Removed {what}, {freed}.", err=True)


def list_models(usable_bytes: int) -> tuple[list[CachedModel], int]:
    """The family's models in the cache, by name, and how many others there are."""
    from huggingface_hub import scan_cache_dir

    if not _cache_folder().is_dir():
        return [], 0
    found: list[CachedModel] = []
    others = 0
    for repo in scan_cache_dir(_cache_folder()).repos:
        if repo.repo_type != "model":
            continue
        own = list(_revisions(repo, usable_bytes))
        found += own
        others += not own
    return sorted(found, key=lambda model: (model.repository.lower(), model.revision)), others


def _revisions(repo: Any, usable_bytes: int) -> Iterator[CachedModel]:
    """Those of one repository in the cache, as huggingface_hub describes it."""
    import huggingface_hub
    from huggingface_hub.errors import IncompleteSnapshotError

    from mlx_onevision.checkpoint.hub import FILES, NOT_FILES
    from mlx_onevision.checkpoint.load import open_checkpoint
    from mlx_onevision.config.original_layout import is_original
    from mlx_onevision.files import read_json

    for found in repo.revisions:
        folder = Path(found.snapshot_path)
        try:
            config = read_json(folder / "config.json") or {}
        except OneVisionError:
            config = {}
        if config.get("model_type") != "llava_onevision" and not is_original(config):
            continue
        refs = tuple(sorted(found.refs))
        place = (repo.repo_id, found.commit_hash, refs, found.size_on_disk, str(folder))
        try:
            huggingface_hub.snapshot_download(
                repo.repo_id,
                revision=found.commit_hash,
                cache_dir=_cache_folder(),
                local_files_only=True,
                allow_patterns=list(FILES),
                ignore_patterns=list(NOT_FILES),
            )
            opened = open_checkpoint(folder)
        except IncompleteSnapshotError:
            way = f"mlx-onevision models pull {repo.repo_id}"
            yield CachedModel(*place, problem=f"its download is incomplete; type: {way}")
        except OneVisionError as error:
            text = " ".join(str(error).split()).replace(f"{folder}/", "").replace(str(folder), "it")
            yield CachedModel(*place, problem=text)
        else:
            yield CachedModel(*place, None, *_contents(opened, usable_bytes))


def _contents(opened: OpenedCheckpoint, usable_bytes: int) -> tuple[str, str, int, int]:
    """Layout, kind and bytes of the weights, and the context that fits."""
    from mlx_onevision.checkpoint.manifest import NAME
    from mlx_onevision.checkpoint.plan import make_plan
    from mlx_onevision.config.original_layout import is_original
    from mlx_onevision.config.quantization import Quantization
    from mlx_onevision.network.footprint import longest_context

    plan = make_plan(opened.config, opened.tensors, opened.quantized)
    quantization = Quantization.from_dict(opened.values)
    weights = plan.dtype if quantization is None else f"{quantization.default.bits}-bit"
    context = longest_context(
        opened.config,
        plan.nbytes,
        usable_bytes,
        itemsize=4 if plan.dtype == "float32" else 2,
        quantized=bool(opened.quantized),
    )
    layout = "original" if is_original(opened.values) else "hub"
    if opened.quantized or (opened.folder / NAME).exists():
        layout = "mlx"
    return layout, weights, plan.nbytes, context


def usable(memory: int | None) -> int:
    """Bytes for a model: of a Mac of ``memory`` GB, or of this machine."""
    if memory is None:
        from mlx_onevision.engine.memory import working_set

        return working_set()
    from mlx_onevision.network.footprint import usable_bytes

    return usable_bytes(memory * GIBIBYTE)


def _repository(model: str) -> str:
    from mlx_onevision.checkpoint import hub

    found = hub.repository_of(model)
    if found is None:
        raise RequestError(
            f"{model} is no model of the Hub; name a Hugging Face id (org/name), 0.5b, 7b or 72b"
        )
    return found


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def _cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
