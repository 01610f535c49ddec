"""Fine-tuning, from a model's name and files of rows to an adapter."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_onevision.checkpoint import hub
from mlx_onevision.checkpoint.load import load_checkpoint, read_config
from mlx_onevision.checkpoint.recipes import while_loading
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.engine.memory import working_set
from mlx_onevision.errors import OutOfMemoryError, RequestError
from mlx_onevision.prompt.processor import Processor
from mlx_onevision.train.data import TRAIN, VALID, Example, Rows, shown
from mlx_onevision.train.features import FeatureStore
from mlx_onevision.train.loop import Run, Settings
from mlx_onevision.train.parts import set_up
from mlx_onevision.train.step import predicted_bytes


@dataclass(frozen=True)
class Task:
    """What to train, on which data, and where the result goes.

    model, revision, dtype, quantize, memory_limit : as :func:`mlx_onevision.load` takes them; what
        is trained itself (method "full") is float32 unless ``dtype`` says otherwise.
    data : a file of rows, or a folder with train.jsonl and, where it is measured, valid.jsonl.
    valid : a file of rows to measure the loss on.
    output : the adapter's folder.
    cache : where the features of a tower that is not trained are kept.
    media : which frames of videos, tiling, order; see :meth:`Processor.prepare`.
    longest : tokens of a row, at most; None: the model's context.
    settings : how; see :class:`~mlx_onevision.train.loop.Settings`.
    """

    model: str | Path
    data: Path
    output: Path
    cache: Path
    valid: Path | None = None
    revision: str | None = None
    dtype: str | None = None
    quantize: int | None = None
    memory_limit: float | None = None
    media: Mapping[str, Any] = field(default_factory=dict[str, Any])
    longest: int | None = None
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True)
class Prepared:
    """The rows of a task, checked, and the folder of its model."""

    folder: Path
    rows: Rows
    processor: Processor
    examples: list[Example]
    valid: list[Example]

    def dry_run(self, count: int = 3) -> list[str]:
        """The first rows as the model sees them."""
        return [f"{e.where}: {shown(e, self.processor)}" for e in self.examples[:count]]


def prepare(task: Task, report: Callable[[str], None]) -> Prepared:
    """Reads and checks all rows; the weights are not opened. ``report`` : called with a sentence
    for each row that cannot be trained on.

    Raises:
        OneVisionError: for a model or a file that cannot be read, and where there is a bad row.
    """
    data, valid = task.data, task.valid
    if data.is_dir():
        if valid is None and (data / VALID).is_file():
            valid = data / VALID
        data = data / TRAIN
    folder = hub.resolve(task.model, task.revision)
    config = OneVisionConfig.from_dict(read_config(folder))
    processor = Processor.from_folder(folder, config)
    context = config.text_config.max_position_embeddings
    rows = Rows(processor, task.media, min(task.longest or context, context))
    examples = rows.read(data, report)
    return Prepared(folder, rows, processor, examples, rows.read(valid, report) if valid else [])


def train(
    task: Task,
    prepared: Prepared,
    say: Callable[[str], None] = lambda _: None,
    on_line: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> None:
    """Trains, or goes on where the same task was stopped, and writes the adapter.

    say : called with a sentence about what is being done. on_line : with each line of the log.

    Raises:
        OneVisionError: for what does not fit, for a folder that holds something else, and where no
            validation loss was finite.
    """
    settings, trained = task.settings, task.settings.trained
    if settings.patience is not None and not prepared.valid:
        raise RequestError(
            "--patience counts measurements of the validation loss, and there are no validation "
            "rows; give --valid, or leave --patience out"
        )
    dtype = task.dtype or ("float32" if trained.method == "full" else None)
    if trained.method == "full" and task.quantize is not None:
        raise RequestError("quantized weights are not trained themselves; use --method lora")
    recipe = while_loading(task.quantize)
    loaded = load_checkpoint(prepared.folder, dtype, recipe, fused=False)
    name, revision = hub.identify(prepared.folder)
    set_up(loaded.model, trained, settings.seed)
    everything = [*prepared.examples, *prepared.valid]
    needed = predicted_bytes(loaded.model, everything, settings.batch)
    say(f"{len(prepared.examples)} rows; a step takes about {needed / 1e9:.2f} GB")
    _admit(needed, task.memory_limit)
    if "tower" in trained.parts:

        def sources(example: Example) -> Any:
            return prepared.rows.prepare(example).media

    else:
        store = FeatureStore(task.cache, (revision, str(dtype), str(recipe)))
        sources = store.of

        def encoded(done: int, of: int) -> None:
            if done == of or done % 100 == 0:
                say(f"encoded the media of {done} of {of} rows")

        store.fill(loaded.model, prepared.rows, everything, encoded)
    about = {
        "model": name,
        "revision": revision,
        "dtype": dtype,
        "quantize": task.quantize,
        "rows": len(prepared.examples),
        "validation_rows": len(prepared.valid),
        **{key: value for key, value in asdict(settings).items() if key != "trained"},
    }
    run = Run(
        loaded.model,
        settings,
        prepared.examples,
        prepared.valid,
        task.output,
        sources,
        about,
        on_line,
    )
    # Beyond its limit MLX waits for the device, which frees what it has used, before it gives it
    # more to do; else it runs ahead and holds twice as much.
    before = mx.set_memory_limit(needed)
    try:
        run.train()
    finally:
        mx.set_memory_limit(before)


def _admit(needed: int, limit: float | None) -> None:
    """OutOfMemoryError where a step will not fit. ``limit`` : GB, instead of the device's."""
    usable = working_set() if limit is None else int(limit * 1e9)
    if needed > usable:
        raise OutOfMemoryError(
            f"a step takes about {needed / 1e9:.1f} GB, and there are {usable / 1e9:.1f} GB; train "
            "with a smaller --batch, --rank or --visual-tokens, or a quantized model"
        )
