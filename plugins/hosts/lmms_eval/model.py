# pyright: standard, reportMissingImports=false
"""The model, for lmms-eval."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import count
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm

from mlx_onevision.api import Model, load
from mlx_onevision.engine.options import Options
from mlx_onevision.errors import RequestError
from mlx_onevision.plugins.hosts.lmms_eval import prompts
from mlx_onevision.plugins.hosts.lmms_eval.prompts import Message, Visuals
from mlx_onevision.prompt.processor import Inputs

END_OF_TURN = "<|im_end|>"


class MeasuredLoss(GenerationResult):
    """The loss of an answer, and whether the model would have given it: a pair.

    In a GenerationResult, whose content lmms-eval takes as it is: of a bare pair it makes a string
    (in 0.7.3), and its tasks of several choices stop at that.
    """

    def __init__(self, loss: float, greedy: bool) -> None:
        content: Any = (loss, greedy)
        super().__init__(content)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.text)


class OneVision(lmms):
    """A model of this package for lmms-eval, loaded when it is made.

    pretrained, revision, dtype, quantize : as :func:`mlx_onevision.load` takes them.
    batch_size : questions that are answered together.
    max_frames_num : of a video.
    until : whether a task's stop strings end an answer; see :func:`prompts.options`.
    device, max_batch_size : lmms-eval passes them to every model; MLX has one device.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "7b",
        revision: str | None = None,
        dtype: str | None = None,
        quantize: int | None = None,
        batch_size: int | str = 1,
        max_frames_num: int = prompts.DEFAULT_FRAMES,
        until: bool = False,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise RequestError(f"batch_size is {batch_size!r}; it must be a number, 1 or more")
        self.batch_size = int(batch_size)
        self._frames, self._until = int(max_frames_num), bool(until)
        self._source: dict[str, Any] = {
            "model": str(pretrained),
            "revision": None if revision is None else str(revision),
            "dtype": dtype,
            "quantize": quantize,
        }
        self._warned: set[str] = set()
        # What is wrong with it is reported now, not after the tasks have been downloaded.
        self._opened: Model | None = self._open()

    def _open(self) -> Model:
        return load(**self._source, chat_template=prompts.CHAT_TEMPLATE)

    @property
    def model(self) -> Model:
        """Loaded, again if it has been freed."""
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def clean(self) -> None:
        """Frees the model once everything is answered: a judge may need the memory."""
        super().clean()
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        answers: list[GenerationResult] = []
        with self._progress(len(requests)) as bar:
            for group in _groups(requests, self.batch_size):
                rows = []
                for request in group:
                    context, given, doc_to_visual, doc_id, task, split = request.args
                    about = self._shown(doc_to_visual, task, split, doc_id, request.metadata)
                    rows.append((context, about, given))
                for (context, _, given), answer in zip(rows, self._answers(rows), strict=True):
                    self.cache_hook.add_partial("generate_until", (context, given), answer.text)
                    answers.append(answer)
                bar.update(len(group))
        return answers

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Each round is a question of its own, which the task makes of the answers before."""
        answers: list[list[str]] = []
        with self._progress(len(requests)) as bar:
            for request in requests:
                context, given, doc_to_visual, doc_to_text, doc_id, task, split = request.args
                document = self.task_dict[task][split][doc_id]
                visuals, given_answers, info = doc_to_visual(document), [], None
                for past in count(1):
                    about = prompts.shown(visuals, request.metadata, self._frames)
                    (answer,) = self._answers([(context, about, given)])
                    visuals, context, ended, given_answers, info = doc_to_text(
                        document,
                        previous_output=[*given_answers, answer.text],
                        round_idx=past,
                        previous_round_info=info,
                    )
                    if ended:
                        break
                given_answers = list(given_answers)
                task_method, key = "generate_until_multi_round", (context, given)
                self.cache_hook.add_partial(task_method, key, given_answers)
                answers.append(given_answers)
                bar.update(1)
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[MeasuredLoss]:
        """The loss of each answer, and whether the model would have given it.

        A loss, less of which is better, and no logarithm of a probability: so the reference
        returns it, and so lmms-eval's tasks of several choices read it (they take the least).
        """
        found: list[MeasuredLoss] = []
        document, about = None, Visuals()
        with self._progress(len(requests)) as bar:
            for request in requests:
                if len(request.args) != 6:
                    raise RequestError("the metric acc_mutual_info is not supported; leave it out")
                context, target, doc_to_visual, doc_id, task, split = request.args
                if document != (task, split, doc_id):  # the choices of one come one after another
                    document = task, split, doc_id
                    about = self._shown(doc_to_visual, *document, request.metadata)
                if callable(target):
                    target = target(self.task_dict[task][split][doc_id])
                prompt = self.model.prepare(
                    prompts.conversation(context, about), tiling=about.tiling
                )
                about = about.read(prompt.media)
                found.append(
                    self._loss(prompt, prompts.answered(context, about, str(target)), about)
                )
                self.cache_hook.add_partial("loglikelihood", (context, target), found[-1])
                bar.update(1)
        return found

    def _loss(self, prompt: Inputs, messages: list[Message], about: Visuals) -> MeasuredLoss:
        whole = self.model.prepare(messages, tiling=about.tiling)
        following = whole.input_ids[len(prompt.input_ids) :]
        logits = self.model.logits(whole, last=len(following) + 1)[:-1]
        own = len(following) - following[::-1].tolist().index(self._end) - 1
        measured = prompts.answer_loss(logits, following, own)
        return MeasuredLoss(measured.loss, measured.greedy)

    @cached_property
    def _end(self) -> int:
        """The id of the token that ends a turn."""
        from mlx_onevision.prompt.tokenizer import Tokenizer

        found = Tokenizer.from_folder(self.model.path).token_to_id(END_OF_TURN)
        if found is None:
            raise RequestError(
                f"the tokenizer has no {END_OF_TURN}, with which the reference ends a turn"
            )
        return found

    def _answers(
        self, rows: Sequence[tuple[str, Visuals, Mapping[str, Any]]]
    ) -> list[GenerationResult]:
        """Answers to questions, together. One that cannot be asked is logged, and answered with
        nothing: the others took hours.
        """
        asked: list[list[Message]] = []
        settings: list[Options] = []
        for context, about, given in rows:
            self._say_once(prompts.unknown(given))
            asked.append(prompts.conversation(context, about))
            settings.append({**prompts.options(given, until=self._until), "tiling": about.tiling})
        answers = []
        for answer in self.model.generate(batch=asked, options=settings):
            if answer.error is not None:
                logger.error(f"A question was not answered: {answer.error}")
            usage = answer.usage
            counts = TokenCounts(usage.prompt_tokens, usage.completion_tokens)
            answers.append(GenerationResult(answer.text.strip(), counts))
        return answers

    def _shown(
        self, doc_to_visual: Any, task: str, split: str, doc_id: Any, metadata: Mapping[str, Any]
    ) -> Visuals:
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        return prompts.shown(visuals, metadata, self._frames)

    def _progress(self, total: int) -> "tqdm[Any]":
        return tqdm(total=total, disable=self.rank != 0, desc="Model Responding")

    def _say_once(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._warned:
                self._warned.add(name)
                logger.warning(f"{name} of the task's generation_kwargs has no effect here")


def _groups(requests: Sequence[Instance], size: int) -> Iterator[Sequence[Instance]]:
    for first in range(0, len(requests), size):
        yield requests[first : first + size]
