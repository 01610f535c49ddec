"""Measures a new folder against its source, before it takes its place, and compares recipes."""

import dataclasses
import shutil
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from mlx_onevision.checkpoint.load import open_checkpoint
from mlx_onevision.checkpoint.plan import FLOATS
from mlx_onevision.checkpoint.recipes import Recipe
from mlx_onevision.convert.conversion import Conversion, prepare, write
from mlx_onevision.convert.hub import Source
from mlx_onevision.convert.loss.measure import Progress, Reference, measure
from mlx_onevision.convert.loss.metrics import Loss
from mlx_onevision.convert.loss.probes import QUICK, Probe, probes
from mlx_onevision.convert.report import ConversionSummary, size, table
from mlx_onevision.engine.memory import working_set
from mlx_onevision.errors import CheckpointError
from mlx_onevision.network import memory_budget as memory

WIDTHS = {"F16": 2, "BF16": 2, "F32": 4}  # bytes a value
INTRODUCTION = (
    "Measured against the source on a fixed set of drawn images and of texts, which the source's "
    "own answers belong to:"
)

# Mean KL divergences, in nats, ten times those that were measured at so many bits and more. Below 4
# bits a model may well be lost without anybody's error.
SUSPICIOUS = {8: 0.02, 4: 0.5}


class Verification:
    """Measures a folder against its source: the ``measure`` of a conversion. Afterwards ``loss``
    is what was measured, and ``warning`` a sentence where the recipe does not explain it.
    """

    def __init__(
        self,
        summary: ConversionSummary,
        unchanged: bool,
        progress: Progress = lambda done, total: None,
        adapter: Path | None = None,
    ) -> None:
        self._adapter = adapter
        self._summary, self._unchanged, self._progress = summary, unchanged, progress
        self.loss: Loss | None = None
        self.warning: str | None = None

    def __call__(self, source: Path, result: Path) -> str:
        """Markdown for the model card."""
        quick = [probe for probe in probes() if probe.name in QUICK] if self._unchanged else None
        # What is the same is the same in any type, and quickest in its own.
        dtype = None if self._unchanged else computing_dtype(source, result)
        try:
            loss = measure(
                source,
                result,
                dtype=dtype,
                probe_set=quick,
                progress=self._progress,
                adapter=self._adapter,
            )
        except CheckpointError as error:
            text = str(error).replace(str(result), "the new model")
            raise CheckpointError(
                f"{text}; nothing was written, which --no-verify would do all the same"
            ) from None
        self.loss = dataclasses.replace(loss, result=str(self._summary.target))
        self.warning = suspicion(self._summary, loss)
        text = f"{INTRODUCTION}\n\n```\n{table(loss)}```"
        return f"{text}\n\n{self.warning}." if self.warning else text


def suspicion(summary: ConversionSummary, loss: Loss) -> str | None:
    """A sentence about a loss that so many bits do not explain; None for any other."""
    fewest = min((spec.bits for spec in summary.specs.values()), default=16)
    bound = next((most for bits, most in SUSPICIOUS.items() if fewest >= bits), None)
    if bound is None or loss.all.kl_mean <= bound:
        return None
    return (
        f"the new model is {loss.all.kl_mean:.2g} nats a position from its source, where at most "
        f"{bound} were to be expected of {summary.recipe}: look at its answers before you use it"
    )


def is_unchanged(planned: Conversion) -> bool:
    """Whether the plan writes the source's weights as they are."""
    floats = {FLOATS[t.dtype] for t in planned.opened.tensors.values() if t.dtype in FLOATS}
    same = floats == {planned.plan.dtype} and planned.adapter is None
    # Quantized anew, even in the same bits, values are rounded once more.
    anew = any(step.spec or step.dequantize_spec for step in planned.plan.transforms)
    return same and not anew


def too_large(source: Path) -> str | None:
    """Why a source cannot be measured against on this machine: it does not fit even as it is."""
    needed = _loaded_bytes(source, None)
    if _fits(needed):
        return None
    return (
        f"the loss was not measured: the source takes {size(needed)} of memory, of which "
        f"{size(working_set())} may be used here; --verify measures it all the same"
    )


def computing_dtype(*folders: Path) -> str | None:
    """float32, or None, a folder's own type, where float32 would not fit this machine."""
    return "float32" if all(_fits(_loaded_bytes(folder, 4)) for folder in folders) else None


def _fits(needed: int) -> bool:
    room = working_set()
    return needed + memory.scratch_bytes(room, needed) <= room


def _loaded_bytes(folder: Path, width: int | None) -> int:
    """Of a folder's weights in memory, floating-point values in ``width`` bytes each."""
    total = 0
    for tensor in open_checkpoint(folder).tensors.values():
        own = WIDTHS.get(tensor.dtype)
        nbytes = tensor.stop - tensor.start
        total += nbytes * width // own if own and width else nbytes
    return total


def compare(
    source: Source,
    recipes: Sequence[Recipe],
    dtype: str | None = None,
    progress: Progress = lambda done, total: None,
    probe_set: Sequence[Probe] | None = None,
) -> list[tuple[str, Loss]]:
    """The loss of each recipe, by its name: converted, measured against the source, and removed.
    One converted model is on the disk at a time, in a temporary folder (``TMPDIR``).

    progress : called with how many steps are done, and of how many.

    Raises:
        OneVisionError: as a conversion and its measurement do; nothing is left then.
    """
    given = probes() if probe_set is None else probe_set
    reference = Reference(source.folder, dtype=computing_dtype(source.folder), probe_set=given)
    steps, total = count(1), (1 + 2 * len(recipes)) * len(given)  # the source answers once

    def step(_: int, __: int) -> None:
        progress(next(steps), total)

    losses: list[tuple[str, Loss]] = []
    with TemporaryDirectory(prefix="mlx-onevision-") as room:
        for recipe in recipes:
            conversion = prepare(source, Path(room) / recipe.name, recipe, dtype)
            folder = write(conversion).target
            losses.append((recipe.name, reference.measure(folder, step)))
            shutil.rmtree(folder)
    return losses
