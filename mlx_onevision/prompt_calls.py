"""The calls of a model about prompts and conversations: answers, requests, ids and logits."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.engine.engine import Engine
from mlx_onevision.engine.generation import (
    Generation,
    Messages,
    RequestBuilder,
    Stream,
    submit,
    submit_all,
)
from mlx_onevision.engine.options import Options, batch_requests, check_names
from mlx_onevision.engine.request import PromptRequest
from mlx_onevision.errors import OneVisionError, RequestError
from mlx_onevision.media.image import ImageSource
from mlx_onevision.media.video import VideoSource, no_check
from mlx_onevision.prompt.messages import normalise_messages
from mlx_onevision.prompt.processor import Inputs, Order, Processor


class PromptCalls:
    """What :class:`~mlx_onevision.model.Model` has for prompts and conversations."""

    def __init__(self, engine: Engine, processor: Processor, builder: RequestBuilder) -> None:
        self._engine, self._processor, self._builder = engine, processor, builder

    @overload
    def generate(
        self,
        prompt: str | None = None,
        *,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        messages: Messages | None = None,
        **given: Unpack[Options],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        *,
        batch: Sequence[str | Messages],
        options: Sequence[Options] | None = None,
        **given: Unpack[Options],
    ) -> list[Generation]: ...

    def generate(
        self,
        prompt: str | None = None,
        *,
        batch: Sequence[str | Messages] | None = None,
        options: Sequence[Options] | None = None,
        **given: Any,
    ) -> Generation | list[Generation]:
        """Answers one prompt about images and videos, one conversation, or a batch of them.

        prompt, images, videos, messages, batch, options, given : as :meth:`stream` takes them.

        Returns a :class:`Generation`; for a batch a list of them, in order. A conversation of a
        batch that cannot be answered has ``finish_reason`` "error" and its error in ``error``; the
        others are answered.

        Raises:
            OneVisionError: what :meth:`stream` raises, and what goes wrong before the answer's end;
                CancelledError where ``check`` raises it.
        """
        if batch is None:
            return self._ask(prompt, options, given).result()
        streams = self._ask_all(prompt, batch, options, given)
        try:
            return [stream.outcome() for stream in streams]
        except BaseException:  # Ctrl-C: nobody waits for the others any more
            for stream in streams:
                stream.cancel()
            raise

    @overload
    def stream(
        self,
        prompt: str | None = None,
        *,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        messages: Messages | None = None,
        **given: Unpack[Options],
    ) -> Stream: ...

    @overload
    def stream(
        self,
        *,
        batch: Sequence[str | Messages],
        options: Sequence[Options] | None = None,
        **given: Unpack[Options],
    ) -> list[Stream]: ...

    def stream(
        self,
        prompt: str | None = None,
        *,
        batch: Sequence[str | Messages] | None = None,
        options: Sequence[Options] | None = None,
        **given: Any,
    ) -> Stream | list[Stream]:
        """Starts an answer, as a stream of text; for a batch, a stream for each request.

        prompt : the question.
        images : what it is about: paths, URLs, bytes of files, PIL images, or arrays (H, W),
            (H, W, 3) or (H, W, 4), uint8 or uint16.
        videos : paths, URLs, bytes of files, lists of frames, or uint8 arrays (T, H, W, 3).
        messages : a whole conversation instead, as a list of {"role", "content"}; content is text
            or a list of {"type": "text" | "image" | "video", ...} as transformers takes them.
            Blocks without a source take theirs from ``images`` and ``videos``.
        batch : conversations or prompts instead, of any length, with any media, answered together,
            each as it would be alone, up to the rounding of half precision.
        given : settings, by the names in :class:`Options`; for a batch they hold for every request.
        options : for a batch, settings of each request, which come before those for all.

        Returns a :class:`Stream`; for a batch a list of them, in order.

        Media are read before this returns; ``check`` can stop that. Of a batch, an error is raised
        by the stream of its request, else before this returns.

        Raises:
            RequestError: for an empty prompt, an unknown setting or a number out of range.
            MediaError: for an image or a video that cannot be read; TooLargeError for one beyond
                the limits of size.
            ContextOverflowError: for a prompt, or more frames, beyond the model's context.
            OutOfMemoryError: for a prompt and an answer beyond the memory limit; MemoryLimitError
                where they can never fit.
            DiedError: once the model's thread has died.
        """
        if batch is None:
            return self._ask(prompt, options, given)
        return self._ask_all(prompt, batch, options, given)

    def _ask(
        self, prompt: str | None, options: Sequence[Options] | None, given: Mapping[str, Any]
    ) -> Stream:
        if options is not None:
            raise RequestError("options are for a batch; give settings by their names")
        check_names(given)
        request = self._builder.build_request(prompt, **given)
        return submit(self._engine, self._processor.tokenizer, request)

    def _ask_all(
        self,
        prompt: str | None,
        batch: Sequence[str | Messages],
        options: Sequence[Options] | None,
        given: Mapping[str, Any],
    ) -> list[Stream]:
        if prompt is not None or given.keys() & {"messages", "images", "videos"}:
            raise RequestError("give a batch or one prompt or conversation, not both")
        check_names(given)
        requests: list[PromptRequest | OneVisionError] = []
        for conversation, settings in batch_requests(batch, options):
            try:
                own: dict[str, Any] = {**conversation, **given, **settings}
                requests.append(self._builder.build_request(**own))
            except OneVisionError as error:
                requests.append(error)
        return submit_all(self._engine, self._processor.tokenizer, requests)

    @property
    def checkpoint_max_tokens(self) -> int | None:
        """The checkpoint's max_new_tokens, which holds for answers without ``max_tokens``; None
        where it has none (256 tokens then).
        """
        return self._engine.defaults.max_new_tokens

    @property
    def samples(self) -> bool:
        """Whether the checkpoint asks for sampled answers where no temperature is given."""
        return self._engine.defaults.do_sample

    def build_request(self, messages: Messages, **given: Unpack[Options]) -> PromptRequest:
        """A conversation, read and tokenized, for :meth:`submit_all`.

        messages, given : as :meth:`stream` takes them; its errors are raised here.
        """
        return self._builder.build_request(messages=messages, **given)

    def compile_schema(
        self, json_schema: str | bool | Mapping[str, Any], check: Callable[[], None] = no_check
    ) -> None:
        """Compiles a JSON schema ahead of its first answer.

        json_schema : as in :class:`Options`.
        check : called now and then; what it raises ends the compilation.

        Raises:
            RequestError: for a schema that cannot be compiled, or without the extra ``structured``.
        """
        self._builder.compile_schema(json_schema, check)

    def submit_all(self, requests: Sequence[PromptRequest]) -> list[Stream]:
        """Starts the answers to requests that :meth:`build_request` made, which run together.

        Returns a stream for each of ``requests``, in order, which raises its own error.
        """
        return submit_all(self._engine, self._processor.tokenizer, requests)

    def render(self, messages: Messages, order: Order = "template") -> str:
        """The prompt text that the chat template makes, with one placeholder for each medium.

        messages : a conversation, as :meth:`stream` takes it; blocks need no sources.
        order : as in :class:`Options`.

        Raises:
            RequestError: for messages of another form.
        """
        return self._processor.render(normalise_messages(messages=messages, unfilled=True), order)

    def prepare(
        self,
        messages: Messages,
        *,
        images: Iterable[ImageSource] | None = None,
        videos: Iterable[VideoSource] | None = None,
        **options: Any,
    ) -> Inputs:
        """Token ids (L,) as transformers' processor makes them, and the pixel tiles of each medium,
        uint8 (tiles, S, S, 3).

        messages : a conversation, as :meth:`stream` takes it.
        images, videos : those of blocks without a source.
        options : see :meth:`~mlx_onevision.prompt.processor.Processor.prepare`.

        Raises:
            RequestError, MediaError, ContextOverflowError: as :meth:`stream` does.
        """
        conversation = normalise_messages(messages=messages, images=images, videos=videos)
        return self._processor.prepare(conversation, **options)

    def logits(self, inputs: Inputs, last: int | None = None) -> NDArray[np.float32]:
        """Logits of a prepared prompt, float32 (positions, vocab_size).

        inputs : what :meth:`prepare` returned.
        last : so many of the last positions; None: all of them.

        Raises:
            OutOfMemoryError: where they cannot stay within the memory limit.
        """
        return self._engine.logits(inputs, last)
