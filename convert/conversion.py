"""From a checkpoint of any layout to a whole, checked folder in MLX's, or to nothing."""

import dataclasses
import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from mlx_onevision.checkpoint import adapters, manifest
from mlx_onevision.checkpoint.apply_adapter import changes, check_fit
from mlx_onevision.checkpoint.hub import resolve_adapter
from mlx_onevision.checkpoint.load import OpenedCheckpoint, open_checkpoint
from mlx_onevision.checkpoint.plan import (
    CODES,
    Change,
    ConversionPlan,
    LazyTensorFiles,
    OutputTensor,
    TensorTransform,
    make_plan,
)
from mlx_onevision.checkpoint.recipes import Recipe
from mlx_onevision.checkpoint.tensors import INDEX, POST_LAYERNORM, Tensor, written_name
from mlx_onevision.config.model import DTYPES, OneVisionConfig
from mlx_onevision.convert.card import card
from mlx_onevision.convert.config_files import config_json, processor_files
from mlx_onevision.convert.hub import Source, find
from mlx_onevision.convert.report import ConversionSummary
from mlx_onevision.convert.staging import Staging, require_space, require_target
from mlx_onevision.convert.writer import Part, Shard, Writer, divide, index, write_shard
from mlx_onevision.errors import CheckpointError, RequestError
from mlx_onevision.prompt.processor import Processor
from mlx_onevision.train.report import LOG, curve_table

SHARD_BYTES = 5 << 30
MARGIN = 1 << 20  # bytes of a disk that are left alone

Measure = Callable[[Path, Path], str]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Conversion:
    """A conversion that :func:`prepare` has planned."""

    source: Source
    target: Path
    opened: OpenedCheckpoint
    plan: ConversionPlan
    shards: Sequence[Shard]
    summary: ConversionSummary
    adapter: Path | None = None


def convert(
    model: str | Path,
    target: str | Path,
    *,
    revision: str | None = None,
    recipe: Recipe | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
    measure: Measure | None = None,
    command: str | None = None,
    adapter: str | Path | None = None,
) -> ConversionSummary:
    """Converts a model into a folder, which afterwards is whole and checked, or as it was.

    model, revision : as for ``load``.
    recipe : None quantizes nothing.
    dtype : ``float16``, ``bfloat16`` or ``float32`` for what is not quantized; None: the source's.
    dequantize : dequantizes what is quantized in the source.
    shard_bytes : of tensors in one file, at most.
    overwrite : replace a model that is at ``target``, once the new one has been checked.
    progress : called with how many bytes have been written and read back, and of how many.
    measure : called with the source's folder and the new one, which can be loaded by then; returns
        Markdown for the model card.
    command : what to name in the model card; None for the call of this function.
    adapter : a folder or a Hub id of an adapter to fuse; what is quantized is quantized anew.

    Raises:
        OneVisionError: saying in one sentence what is wrong; nothing has been changed then.
    """
    require_target(Path(target), overwrite)  # before anything is downloaded
    _require_dtype(dtype)
    source = find(model, revision)
    fused = None if adapter is None else resolve_adapter(adapter)
    conversion = prepare(
        source, Path(target), recipe, dtype, dequantize, shard_bytes, overwrite, fused
    )
    return write(conversion, overwrite, progress, measure, command)


def prepare(
    source: Source,
    target: Path,
    recipe: Recipe | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    adapter: Path | None = None,
) -> Conversion:
    """Plans all that would be written, to the byte; writes nothing. Raises OneVisionError for what
    is wrong with the source, the target or the request.
    """
    _require_dtype(dtype)
    target = require_target(target, overwrite)
    origin = source.folder.resolve()
    if target == origin or target in origin.parents or origin in target.parents:
        raise RequestError(f"{target} is the model to convert, or holds it; name another folder")
    opened = open_checkpoint(source.folder)
    plan = make_plan(
        opened.config,
        opened.tensors,
        opened.quantized,
        recipe=recipe,
        dtype=dtype,
        dequantize=dequantize,
        changes=_changes(opened, adapter),
    )
    shards = divide(_parts(opened, plan), shard_bytes)
    summary = _summary(source, target, opened, plan, shards, recipe, adapter)
    return Conversion(source, target, opened, plan, shards, summary, adapter)


def _changes(opened: OpenedCheckpoint, adapter: Path | None) -> Mapping[str, Change]:
    if adapter is None:
        return {}
    found = adapters.read_adapter(adapter)
    check_fit(found, opened.network)
    return changes(found, opened.network)


def write(
    conversion: Conversion,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
    measure: Measure | None = None,
    command: str | None = None,
) -> ConversionSummary:
    """Does what :func:`prepare` planned, or changes nothing: StorageError when it cannot write."""
    source, opened, plan = conversion.source, conversion.opened, conversion.plan
    shards, summary = conversion.shards, conversion.summary
    begun = time.monotonic()
    Processor.from_folder(source.folder, opened.config)  # before weights are written for nothing
    side = {
        INDEX: index(shards, summary.values),
        **processor_files(opened),
        # Last of what a loader needs: a folder without it is no model's.
        "config.json": config_json(opened, plan, source, summary.version, summary.recipe),
    }
    nbytes = sum(shard.nbytes for shard in shards) + sum(map(len, side.values()))
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done = min(done + more, 2 * nbytes)  # the card and the manifest are not counted
        progress(done, 2 * nbytes)

    files: dict[str, manifest.File] = {}
    with Staging(conversion.target, overwrite) as staging:
        folder = staging.path
        require_space(folder.parent, nbytes + MARGIN)
        for shard in shards:
            files[shard.name] = write_shard(folder, shard, count)
        for name, content in side.items():
            files[name] = _write(folder / name, content, count)
        Processor.from_folder(folder, plan.config)
        loss = None if measure is None else measure(source.folder, folder)
        words = shlex.join([summary.source, summary.target.name])
        command = command or f"mlx_onevision.convert: {words} ({summary.recipe})"
        curve = None if conversion.adapter is None else curve_table(conversion.adapter / LOG)
        readme = card(source, summary, loss, command, plan.config.model_type, curve)
        files["README.md"] = _write(folder / "README.md", readme)
        _write(folder / manifest.NAME, manifest.text(files).encode())
        check(folder, plan.config, count)
        staging.publish()
    sizes = {name: file.size for name, file in files.items()}
    return dataclasses.replace(summary, files=sizes, seconds=time.monotonic() - begun)


def check(folder: Path, config: OneVisionConfig, progress: Callable[[int], None]) -> None:
    """Raises CheckpointError unless a new folder's bytes and configuration are those planned."""
    manifest.check(folder, hashes=True, progress=progress)
    if open_checkpoint(folder).config != config:
        raise CheckpointError("what was written is not the model that was planned")


def _write(
    path: Path, content: bytes, progress: Callable[[int], None] = lambda _: None
) -> manifest.File:
    with Writer(path, progress) as file:
        file.write(content)
    return file.written


def _parts(opened: OpenedCheckpoint, plan: ConversionPlan) -> list[Part]:
    files = LazyTensorFiles()

    def make(step: TensorTransform) -> list[mx.array]:
        return [array for _, array in step.run(files.take)]

    parts = [Part(step.outputs, partial(make, step)) for step in plan.transforms]
    width = opened.config.vision_config.hidden_size

    def norm(tensor: Tensor | None, fill: Callable[..., mx.array]) -> list[mx.array]:
        array = fill((width,)) if tensor is None else files.take(tensor)
        return [array.astype(getattr(mx, plan.dtype))]

    for name, fill in zip(POST_LAYERNORM, (mx.ones, mx.zeros), strict=True):
        # Never used, but other programs will not load a tower without it.
        tensor = opened.unused.get(name)
        if tensor is not None and tensor.shape != (width,):
            raise CheckpointError(
                f"{tensor.source} in {tensor.file.name} has the shape {list(tensor.shape)}; "
                f"config.json asks for {[width]}"
            )
        output = OutputTensor(name, CODES[plan.dtype], (width,))
        parts.append(Part((output,), partial(norm, tensor, fill)))
    return parts


def _summary(
    source: Source,
    target: Path,
    opened: OpenedCheckpoint,
    plan: ConversionPlan,
    shards: Sequence[Shard],
    recipe: Recipe | None,
    adapter: Path | None,
) -> ConversionSummary:
    quantized = Counter(
        ("" if spec.mode == "affine" else f"{spec.mode}, ")
        + f"{spec.bits} bits, groups of {spec.group_size}"
        for spec in plan.specs.values()
    )
    width = plan.config.vision_config.intermediate_size
    padded = None if width == opened.config.vision_config.intermediate_size else width
    nbytes = sum(shard.data_bytes for shard in shards)
    values = plan.values + len(POST_LAYERNORM) * opened.config.vision_config.hidden_size
    name = recipe.name if recipe is not None else "as the source" if plan.specs else plan.dtype
    return ConversionSummary(
        source=source.base or source.name,
        revision=source.commit,
        target=target,
        recipe=name,
        dtype=plan.dtype,
        nbytes=nbytes,
        values=values,
        bits_per_weight=8 * nbytes / values,
        shards=len(shards),
        quantized=dict(sorted(quantized.items())),
        specs={written_name(module): spec for module, spec in plan.specs.items()},
        skipped=tuple(written_name(module) for module in plan.skipped),
        padded=padded,
        files={shard.name: shard.nbytes for shard in shards},
        version=version("mlx-onevision"),
        download=source.download,
        adapter=None if adapter is None else adapters.about(adapter),
    )


def _require_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"dtype is {dtype!r}; supported are {', '.join(DTYPES)}")
