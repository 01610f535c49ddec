# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
"""Training from the first step to the adapter: batches in an order that the seed makes, and a state
on the disk from which a run that was killed goes on to the same losses.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.optimizers as optim
from mlx import utils

from mlx_onevision.checkpoint.adapters import MLX_WEIGHTS
from mlx_onevision.errors import OneVisionError, RequestError
from mlx_onevision.files import save
from mlx_onevision.network.layers import arrays_of
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.train import data
from mlx_onevision.train.data import Example
from mlx_onevision.train.parts import Trained, write_adapter, write_arrays
from mlx_onevision.train.report import LOG
from mlx_onevision.train.step import Batch, Source, loss_and_gradients, loss_sum, number

STATE = "training.safetensors"
BUCKET = 32  # batches whose rows are sorted by length, so that those of a batch are alike
# Lengths are compared in units of 64 tokens. Sorting by exact length would always put rows with the
# same kind of answer into one batch.
ALIKE = 64

Schedule = Literal["constant", "linear", "cosine"]
Sources = Callable[[Example], Sequence[Source]]


@dataclass(frozen=True)
class Settings:
    """How to train.

    trained : which parts, and how.
    steps : updates of the weights; each is of ``accumulate`` batches of ``batch`` rows.
    learning_rate : its largest value; ``schedule`` : how it falls from there to the last step.
    warmup : steps in which it rises to that.
    weight_decay : AdamW's. clip : the norm to which longer gradients are scaled down; 0: none are.
    seed : of the order of the rows, of initial values and of dropout.
    valid_every, save_every : steps between two measurements of the validation loss, and between two
        states on the disk.
    patience : measurements of the validation loss without a better one that end the run.
    """

    trained: Trained = field(default_factory=Trained)
    steps: int = 100
    batch: int = 1
    accumulate: int = 1
    learning_rate: float = 1e-4
    schedule: Schedule = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    valid_every: int = 50
    patience: int | None = None
    save_every: int = 50


@dataclass
class Progress:
    """How far a run is; kept in its state.

    best : the smallest validation loss. worse : measurements since then.
    """

    step: int = 0
    best: float = math.inf
    worse: int = 0


def optimiser(settings: Settings) -> optim.AdamW:
    """AdamW as PyTorch's, with the learning rate that the settings give each step."""
    peak, rest = settings.learning_rate, max(settings.steps - settings.warmup, 1)

    def constant(step: mx.array) -> mx.array:
        return mx.array(peak)

    # MLX's own schedules are functions of a step, which it declares without types.
    schedules: dict[Schedule, Any] = {
        "constant": constant,
        "cosine": optim.cosine_decay(peak, rest),
        "linear": optim.linear_schedule(peak, 0.0, rest),
    }
    rate = schedules[settings.schedule]
    if settings.warmup:
        rising = cast(Any, optim.linear_schedule(peak / settings.warmup, peak, settings.warmup))
        rate = cast(Any, optim.join_schedules([rising, rate], [settings.warmup]))
    return optim.AdamW(rate, weight_decay=settings.weight_decay, bias_correction=True)


def batches(examples: Sequence[Example], settings: Settings) -> Iterator[list[Example]]:
    """Batches of rows of about one length, without end; every row once an epoch."""
    epoch = 0
    while True:
        order = Random(f"{settings.seed} {epoch}")  # noqa: S311 - an order, not a secret
        left = list(range(len(examples)))
        order.shuffle(left)
        found: list[list[int]] = []
        size = settings.batch * BUCKET
        for first in range(0, len(left), size):
            alike = sorted(left[first : first + size], key=lambda n: len(examples[n].ids) // ALIKE)
            found += [alike[n : n + settings.batch] for n in range(0, len(alike), settings.batch)]
        order.shuffle(found)
        yield from ([examples[n] for n in numbers] for numbers in found)
        epoch += 1


class Run:
    """One run on a model that is set up.

    folder : where the adapter, the state and the log are written.
    sources : what the network needs of a row's media.
    about : what belongs into the adapter's configuration.
    on_line : called with each line of the log.
    """

    def __init__(
        self,
        model: OneVision,
        settings: Settings,
        examples: Sequence[Example],
        valid: Sequence[Example],
        folder: Path,
        sources: Sources,
        about: Mapping[str, Any],
        on_line: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> None:
        self.model, self.settings, self.folder = model, settings, folder
        self.examples, self.valid, self._sources = examples, valid, sources
        self._about, self._on_line = dict(about), on_line
        self.progress, self.optimiser = Progress(), optimiser(settings)
        self.optimiser.init(model.trainable_parameters())
        self.log: list[dict[str, Any]] = []
        # A run goes on only as it began. Its model is that of a name and a revision, as loaded.
        base = ("model", "revision", "dtype", "quantize")
        self._identity = {
            **json.loads(json.dumps(asdict(settings))),
            "data": data.digest(examples),
            "valid": data.digest(valid),
            **{key: self._about[key] for key in base if key in self._about},
        }

    def train(self) -> None:
        """Runs to the end, from where an earlier one was stopped.

        Raises:
            RequestError: where the folder holds another run, or one that has ended.
            OneVisionError: where no validation loss was finite, so that there is no best adapter.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        settings, progress = self.settings, self.progress
        waiting = batches(self.examples, settings)
        for _ in range(progress.step * settings.accumulate):
            next(waiting)
        self.model.train()
        while progress.step < settings.steps and not self._has_stopped():
            draw = Random(f"{settings.seed} step {progress.step}")  # noqa: S311 - for dropout
            count = settings.accumulate
            self._step([self._batch(next(waiting), draw.getrandbits(63)) for _ in range(count)])
            last = progress.step == settings.steps
            if self.valid and (progress.step % settings.valid_every == 0 or last):
                self._validate()
            if progress.step % settings.save_every == 0 and not last:
                self._save()
        self._write_log()
        if self.valid and progress.best == math.inf:
            raise OneVisionError(
                f"there is no adapter in {self.folder}, because the validation loss was never "
                "finite; train into another folder with a lower --learning-rate or with --dtype "
                "float32"
            )
        if not self.valid:
            write_adapter(self.folder, self.model, settings.trained, self._about)
        (self.folder / STATE).unlink(missing_ok=True)

    def _has_stopped(self) -> bool:
        patience = self.settings.patience
        return patience is not None and self.progress.worse >= patience

    def _batch(self, rows: Sequence[Example], seed: int = 0) -> Batch:
        return Batch(rows, [self._sources(row) for row in rows], seed)

    def _step(self, given: Sequence[Batch]) -> None:
        started = time.perf_counter()
        mx.reset_peak_memory()
        loss, gradients = loss_and_gradients(self.model, given)
        if self.settings.clip:
            clipped: Any = optim.clip_grad_norm(gradients, self.settings.clip)
            gradients = clipped[0]
        self.optimiser.update(self.model, gradients)
        mx.eval(self.model.trainable_parameters(), self.optimiser.state)
        self.progress.step += 1
        seconds = time.perf_counter() - started
        seen = sum(len(row.ids) for batch in given for row in batch.rows)
        self._note(
            {
                "step": self.progress.step,
                "loss": loss,
                "learning_rate": self.optimiser.learning_rate.item(),
                "seconds": round(seconds, 4),
                "tokens": seen,
                "tokens_per_second": round(seen / seconds, 1),
                "peak_memory_bytes": mx.get_peak_memory(),
            }
        )
        mx.clear_cache()

    def _validate(self) -> None:
        self.model.eval()
        total, tokens = 0.0, 0
        for first in range(0, len(self.valid), self.settings.batch):
            batch = self._batch(self.valid[first : first + self.settings.batch])
            total += number(loss_sum(self.model, batch))
            tokens += batch.tokens
        self.model.train()
        loss, progress = total / tokens, self.progress
        self._note({"step": progress.step, "valid_loss": loss})
        progress.worse += 1
        if loss < progress.best:
            progress.best, progress.worse = loss, 0
            write_adapter(self.folder, self.model, self.settings.trained, self._about)

    def _note(self, line: dict[str, Any]) -> None:
        self.log.append(line)
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._on_line(line)

    def _write_log(self) -> None:
        """Whole again: lines behind the state of a killed run are computed anew."""
        save(self.folder / LOG, "".join(json.dumps(line) + "\n" for line in self.log))

    def _save(self) -> None:
        # Before the first step only the settings are stored; the initial weights can be made again
        # from the seed.
        state: dict[str, Any] = {"step": mx.array(self.progress.step)}
        if self.progress.step:
            state = {"model": self.model.trainable_parameters(), "adam": self.optimiser.state}
        arrays = arrays_of(state)
        about = {
            "progress": json.dumps(asdict(self.progress)),
            "identity": json.dumps(self._identity),
            "log": json.dumps(self.log),
        }
        write_arrays(self.folder / STATE, arrays, about)

    def _resume(self) -> None:
        state = self.folder / STATE
        if not state.is_file():
            if (self.folder / MLX_WEIGHTS).is_file():
                raise RequestError(
                    f"{self.folder} has an adapter already; name another folder, or delete it"
                )
            self._save()
            self._write_log()
            return
        try:
            found: Any = mx.load(str(state), return_metadata=True)
            arrays, about = found
            identity, progress = json.loads(about["identity"]), json.loads(about["progress"])
            self.log = json.loads(about["log"])
        except (RuntimeError, KeyError, ValueError):
            raise RequestError(f"{state} is damaged; delete it to start over") from None
        for key, value in self._identity.items():
            if identity.get(key) != value:
                raise RequestError(
                    f"{self.folder} holds a run with {key} {identity.get(key)!r}, not {value!r}; "
                    "go on as it began, or name another folder"
                )
        self.progress = Progress(**progress)
        if self.progress.step:
            tree: Any = utils.tree_unflatten(list(arrays.items()))
            self.model.update(tree["model"])
            self.optimiser.state = tree["adam"]
        self._write_log()
