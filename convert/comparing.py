"""Recipes beside each other: each is converted, measured against the source, and removed."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from mlx_onevision.checkpoint.recipes import Recipe
from mlx_onevision.convert.conversion import prepare, write
from mlx_onevision.convert.figures import Loss
from mlx_onevision.convert.hub import Source
from mlx_onevision.convert.loss import Progress, Reference
from mlx_onevision.convert.probes import Probe, probes
from mlx_onevision.convert.verify import computing_dtype


def compare(
    source: Source,
    recipes: Sequence[Recipe],
    dtype: str | None = None,
    progress: Progress = lambda done, total: None,
    probe_set: Sequence[Probe] | None = None,
) -> list[tuple[str, Loss]]:
    """The loss of each recipe, by its name.

    One converted model is on the disk at a time, in a temporary folder (``TMPDIR``).

    dtype : as for a conversion.
    progress : called with how many steps are done, and of how many.
    probe_set : other probes than the fixed ones.

    Raises:
        OneVisionError: as a conversion and its measurement do; nothing is left then.
    """
    given = probes() if probe_set is None else probe_set
    reference = Reference(source.folder, dtype=computing_dtype(source.folder), probe_set=given)
    done = 0
    total = (1 + 2 * len(recipes)) * len(given)  # the source answers once

    def step(_: int, __: int) -> None:
        nonlocal done
        done += 1
        progress(done, total)

    losses = []
    with TemporaryDirectory(prefix="mlx-onevision-") as room:
        for recipe in recipes:
            conversion = prepare(source, Path(room) / recipe.name, recipe, dtype)
            folder = write(conversion).target
            losses.append((recipe.name, reference.measure(folder, step)))
            shutil.rmtree(folder)
    return losses
