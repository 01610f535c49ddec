"""Requests to a loaded model, from any thread: tokens stream back, and can be cancelled.

Requests begin in the order in which they are submitted; those that come while others are running
join them, between two tokens. Everything else takes its turn.

MLX arrays belong to the thread that made them. So a :class:`~mlx_onevision.engine.worker.Worker`
builds the :mod:`runner` on a thread of its own, runs every job on it there, one after another, and
drops it there. Ids, texts, numpy arrays and plain numbers cross over.
"""

import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import numpy as np

from mlx_onevision import distributed
from mlx_onevision.checkpoint.hub import identify
from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.checkpoint.recipes import Recipe
from mlx_onevision.config.json_fields import is_number
from mlx_onevision.engine.batch import serve
from mlx_onevision.engine.decode import import_mlx_lm
from mlx_onevision.engine.jobs import Job
from mlx_onevision.engine.memory import (
    Share,
    memory_model,
    process_limit,
    ranks_here,
    shares,
    working_set,
)
from mlx_onevision.engine.prefix_cache import check_settings
from mlx_onevision.engine.ranks import Ranks, compare, lost
from mlx_onevision.engine.request import (
    ActiveRequest,
    PromptRequest,
    as_package_error,
    request_size,
)
from mlx_onevision.engine.runner import Runner
from mlx_onevision.engine.worker import PATIENCE_SECONDS, Progress, Worker
from mlx_onevision.errors import (
    CancelledError,
    ContextOverflowError,
    OneVisionError,
    RequestError,
)
from mlx_onevision.media.video import no_check
from mlx_onevision.network.memory_budget import MemoryModel
from mlx_onevision.network.memory_sizes import RequestSize
from mlx_onevision.network.stages import Split
from mlx_onevision.prompt.processor import Inputs
from mlx_onevision.sampling.detokenizer import TokenBytes

Result = TypeVar("Result")


class Engine:
    """A loaded model on its thread. Making it raises what loading raises.

    dtype : cast the weights to this type; None keeps the checkpoint's.
    recipe : quantize the weights while they are read; None leaves them as they are.
    memory_limit, kv_bits : see :func:`mlx_onevision.api.load`. draft : a draft model's folder.
    adapter : an adapter's folder.
    progress : see :func:`mlx_onevision.api.load`.
    sharded : share the model among the ranks of ``mlx.launch``, where it has started this process.
    split : divide its layers among them; see :func:`mlx_onevision.network.stages.counts`.
        On other ranks than 0 this does not return: they compute what rank 0 does, and end with
        SystemExit when its model is closed.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str | None = None,
        recipe: Recipe | None = None,
        memory_limit: float | None = None,
        kv_bits: int | None = None,
        draft: Path | None = None,
        sharded: bool = False,
        split: Split | None = None,
        adapter: Path | None = None,
        progress: Callable[[int, int], object] = lambda done, total: None,
    ) -> None:
        if memory_limit is not None and not (is_number(memory_limit) and memory_limit > 0):
            raise RequestError(f"memory_limit must be a number of GB above 0, not {memory_limit!r}")
        if split is not None and not sharded:
            raise RequestError("split divides a model that ranks share; add sharded=True")
        if sharded and draft is not None and distributed.launched():
            raise RequestError("ranks of mlx.launch have no draft model; leave it out")
        limit = None if memory_limit is None else int(memory_limit * 1e9)
        self._waiting: deque[ActiveRequest] = deque()  # requests that may run together
        self._order = threading.Lock()
        steps = Progress()
        # Among ranks each process has one model, and all plan for the same limit.
        self._share = share = Share(0, 0, partial(_planned_anew, weakref.ref(self)))
        self._ready = False  # another model's load may ask for a new plan before this is loaded

        def build() -> Runner:
            group = distributed.group() if sharded else None
            if group is not None:
                given = {"dtype": dtype, "quantize": recipe, "kv_bits": kv_bits, "split": split}
                compare(group, settings(folder, given, adapter))
            sharing = ranks_here(group)
            usable = min(limit or sys.maxsize, working_set() // sharing)
            own = limit if sharing == 1 else usable
            if group is not None and split is None:  # all plan for the one with the least memory
                usable = own = int(distributed.least([usable], group)[0])
            # The draft first: none of its weights are read yet, and the model's may be.
            small = None if draft is None else load_checkpoint(draft, dtype=dtype)
            share.most = usable

            def fit(planned: MemoryModel) -> None:
                share.weights = planned.weights
                with shares.counted(share):
                    if group is not None:
                        planned.admit_model(usable)
                    else:
                        shares.join(share, planned.admit_model)

            def admit(planned: MemoryModel) -> None:
                planned = replace(planned, kv_bits=kv_bits)
                fit(planned if small is None else planned.with_draft(memory_model(small, None)))

            checkpoint = load_checkpoint(
                folder,
                dtype,
                recipe,
                limit=usable,
                group=group,
                split=split,
                adapter=adapter,
                admit=admit,
                progress=progress,
            )
            runner = Runner(checkpoint, own, kv_bits, small, steps)
            process_limit.hold(runner, own)
            share.most = runner.limit
            if group is None:
                fit(runner.memory)
                runner.plan(shares.limit(share))
            return runner

        weakref.finalize(self, shares.leave, share)
        try:
            self._worker = Worker(build, steps)
        except BaseException as error:
            shares.leave(share)
            if died := lost(error):
                raise died from error
            raise
        group = self._worker.call(lambda runner: runner.model.group)
        self._ranks = None if group is None else Ranks(group, self._worker.closing)
        # Plain data, anyone's to read.
        self.config = self._worker.call(lambda runner: runner.checkpoint.config)
        self.defaults = self._worker.call(lambda runner: runner.checkpoint.generation_defaults)
        self.memory = self._worker.call(lambda runner: runner.memory)
        self._planned = self._worker.call(lambda runner: runner.limit)
        # Tokens of the longest prompt: the configuration's word for it is no more than that.
        most = self.config.text_config.max_position_embeddings
        self.context = self.memory.longest(most, self.memory_limit)
        self._ready = True
        if self._ranks is not None:
            self._join(self._ranks)
        else:
            self.plan()  # for those that have joined since ``build`` planned

    def _join(self, ranks: Ranks) -> None:
        """Computes with the others from now on, and on other ranks than 0 nothing else."""
        self._worker.post(ranks.run)
        if distributed.rank():
            ranks.ended.result()
            self.close()
            raise SystemExit

    @property
    def memory_limit(self) -> int:
        """Bytes that it may use now, beside the other models of this process."""
        return self._share.most if self._ranks is not None else shares.limit(self._share)

    def plan(self) -> None:
        """Has its thread plan for the limit of now, after what waits there."""
        if (limit := self.memory_limit) != self._planned:
            self._planned = limit
            self._worker.post(lambda runner: runner.plan(limit))

    @property
    def _lost(self) -> bool:
        """Whether it cannot go on for want of other ranks."""
        ended = None if self._ranks is None else self._ranks.ended
        return ended is not None and ended.done() and ended.exception() is not None

    def check_size(self, inputs: Inputs, answer: int, every: bool = False) -> None:
        """OutOfMemoryError where a prompt and its answer cannot stay within the memory limit.
        ``every`` : the logits of every position are wanted.
        """
        with shares.counted(self._share):
            self.memory.admit(request_size(inputs, answer), self.memory_limit, every)

    def admit(self, request: PromptRequest, tokenizer: TokenBytes) -> ActiveRequest:
        """ContextOverflowError when the prompt leaves no room for an answer, OutOfMemoryError when
        both cannot stay within the memory limit.
        """
        if request.proposed and self._ranks is not None:
            raise RequestError("ranks of mlx.launch have no draft tokens; leave them out")
        length, words = len(request.inputs.input_ids), self.config.text_config.vocab_size
        beyond = [token for token in request.sampling.logit_bias if token >= words]
        if beyond:
            raise RequestError(f"logit_bias has token {beyond[0]}; the model has {words} of them")
        limit = self.config.text_config.max_position_embeddings
        if length >= limit:
            raise ContextOverflowError(
                f"the prompt has {length} tokens, but the model's context holds {limit}; "
                "use fewer or smaller media or a shorter text"
            )
        max_tokens = min(request.max_tokens, limit - length)
        if request.open_ended:
            size = request.size(max_tokens)
            max_tokens = max(1, self.memory.answer(size, self.memory_limit) - request.proposed)
        with shares.counted(self._share):
            self.memory.admit(request.size(max_tokens), self.memory_limit)
        self.plan()
        eos = self.defaults.eos_token_ids
        closing = self._worker.closing if self._ranks is None else self._ranks.closing
        return ActiveRequest(request, tokenizer, max_tokens, eos, closing)

    def submit(self, requests: Sequence[ActiveRequest]) -> None:
        """Starts requests, which run together."""
        if self._ranks is not None:
            self._ranks.submit(requests)
            return
        with self._order:
            waiting = self._waiting
            waiting.extend(requests)
            try:
                self._worker.post(
                    lambda runner: serve(runner, waiting), lambda error: _end(requests, error)
                )
            except OneVisionError:  # closed, or dead
                for active in requests:
                    with suppress(ValueError):  # an earlier job has taken it, to see ``closing``
                        waiting.remove(active)
                raise

    def _compute(self, job: Job) -> Job:
        """Runs it after the requests that wait now, and before those that come later."""
        if self._ranks is not None:
            self._ranks.compute(job)
            return job
        closing = self._worker.closing

        def check(*_: object) -> None:
            if job.refused() or closing.is_set():
                raise CancelledError("the request was cancelled")

        with self._order:
            if job.in_turn:
                self._waiting = deque()
            self._worker.post(partial(job.run, check=check), job.end)
        return job

    def logits(self, inputs: Inputs, last: int | None = None) -> np.ndarray:
        """Logits of the last positions of a prompt, or of every one; float32 (L, vocab_size)."""
        if last is not None and last < 0:
            raise RequestError(f"last must be 0 or more, or None for every position, not {last}")
        self.check_size(inputs, 0, every=last is None)
        return self._compute(Job("logits", [inputs, last])).future.result()

    def embed_tiles(
        self, tiles: np.ndarray, normalization: np.ndarray, check: Callable[[], None] = no_check
    ) -> "Future[np.ndarray]":
        """The tower's mean features of tiles (n, S, S, 3), one vector each; float32 (n, width).

        check : called on the inference thread between groups of tiles; ends it by raising.
        """
        return self._compute(Job("embed_tiles", [tiles, normalization], check)).future

    def embed_prompts(
        self, prompts: Sequence[Inputs], check: Callable[[], None] = no_check
    ) -> "Future[np.ndarray]":
        """The last hidden state of each prompt; float32 (n, hidden_size). ``check`` : as above."""
        return self._compute(Job("embed_prompts", [list(prompts)], check)).future

    @property
    def healthy(self) -> bool:
        """False once its thread has died, or while it hangs: it does not answer any more. To be
        asked every second or so; see :class:`~mlx_onevision.engine.worker.Watchdog`.
        """
        return self._worker.alive and not self._lost and not self._worker.hangs

    def save_prompt_cache(self, path: Path, about: Mapping[str, str]) -> None:
        """See :meth:`PrefixCache.save`."""
        self._with_prompt_cache(lambda runner: runner.prefix.save(path, about))

    def load_prompt_cache(self, path: Path, own: Mapping[str, str]) -> tuple[int, dict[str, str]]:
        """See :meth:`PrefixCache.load`. ``own`` : what the file must have been written with; see
        :func:`~mlx_onevision.engine.prefix_cache.check_settings`.

        Raises also OutOfMemoryError, where it cannot stay within the memory limit.
        """

        def admit(tokens: int, about: Mapping[str, str]) -> None:
            check_settings(path, about, own)
            self.memory.admit(RequestSize(tokens, 1), self.memory_limit)

        def load(runner: Runner) -> tuple[int, dict[str, str]]:
            import_mlx_lm()
            return runner.prefix.load(path, admit)

        return self._with_prompt_cache(load)

    def _with_prompt_cache(self, function: Callable[[Runner], Result]) -> Result:
        if self._ranks is not None:  # each has but its own part
            raise RequestError("ranks of mlx.launch have no prompt caches; leave them out")
        with self._order:
            self._waiting = deque()
            future = self._worker.submit(function)
        try:
            return future.result()
        except RuntimeError as error:
            raise as_package_error(error) from error

    def forget(self, inputs: Inputs) -> None:
        """Drops what is kept of a prompt's media once the requests before this have run."""
        self._compute(Job("forget", [[medium.key for medium in inputs.media]]))

    def close(self) -> None:
        """Cancels what is under way and frees the model, on its thread."""
        shares.leave(self._share)
        self._worker.close(patience=0.0 if self._lost else PATIENCE_SECONDS)


def settings(
    folder: Path, given: Mapping[str, object], adapter: Path | None = None
) -> dict[str, str]:
    """What ranks that share a model must have in common."""
    name, revision = identify(folder, adapter)
    revision = "+".join(part[:12] for part in revision.split("+"))
    return {
        "mlx-onevision": version("mlx-onevision"),
        "MLX": version("mlx"),
        "the checkpoint": f"{name} ({revision})",
        **{f"--{name}": str(value) for name, value in given.items()},
    }


def _planned_anew(reference: "weakref.ref[Engine]") -> None:
    engine = reference()
    if engine is not None and engine._ready:  # pyright: ignore[reportPrivateUsage]
        with suppress(OneVisionError):  # closed, or dead
            engine.plan()


def _end(requests: Sequence[ActiveRequest], error: BaseException) -> None:
    for active in requests:
        with suppress(BaseException):  # its reader gets the error, whatever else goes wrong
            active.end(error)
