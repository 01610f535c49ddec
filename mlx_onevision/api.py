"""The library: a loaded model, which any thread may use."""

import json
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Self, Unpack, overload

import numpy as np

from mlx_onevision.asynchronous import AsyncCalls
from mlx_onevision.checkpoint import hub
from mlx_onevision.checkpoint.hub import identify
from mlx_onevision.checkpoint.recipes import Recipe, while_loading
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.describe.formats import VideoDescription
from mlx_onevision.describe.options import DescribeOptions, DescribeSettings
from mlx_onevision.describe.outline import prompts_digest
from mlx_onevision.describe.pipeline import Captioner, Progress
from mlx_onevision.describe.stream import DescriptionStream
from mlx_onevision.embed.embedder import Embedder, Item, Vector
from mlx_onevision.embed.embeddings import Embeddings
from mlx_onevision.engine import generation
from mlx_onevision.engine.engine import Engine
from mlx_onevision.engine.generation import Generation, Messages, Stream
from mlx_onevision.engine.options import Options, batch_requests, check_names
from mlx_onevision.engine.request import PromptRequest
from mlx_onevision.errors import OneVisionError, RequestError
from mlx_onevision.media.decoder import Limits
from mlx_onevision.media.frame_sampling import FrameOptions
from mlx_onevision.media.image import ImageSource
from mlx_onevision.media.video import VideoSource, no_check
from mlx_onevision.network.stages import Split
from mlx_onevision.prompt.messages import normalise_messages
from mlx_onevision.prompt.processor import Inputs, Order, Processor, Tiling
from mlx_onevision.sampling.ranges import check_range


def load(
    model: str | Path = "demo",
    *,
    revision: str | None = None,
    dtype: str | None = None,
    quantize: int | None = None,
    memory_limit: float | None = None,
    kv_bits: int | None = None,
    visual_tokens: float | None = None,
    chat_template: str | None = None,
    draft_model: str | Path | None = None,
    sharded: bool = False,
    split: Split | None = None,
    adapter: str | Path | None = None,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> "Model":
    """Opens a LLaVA-OneVision checkpoint. Weights are mapped, and read when they are first used.

    model : a folder, a Hub id, a size (``0.5b``, ``7b``, ``72b``), or ``demo``: the small model
        that comes with this package and knows coloured shapes.
    revision : branch, tag or commit, for a model of the Hub.
    dtype : ``float16``, ``bfloat16`` or ``float32``; None keeps the checkpoint's own.
    quantize : 4 or 8 quantizes the weights to so many bits while they are read, tensor by tensor,
        as ``mlx-onevision convert -q --q-bits 4`` does; the answers are those of what that writes.
    memory_limit : GB (1e9 bytes) of memory to use at most, weights included. Requests that cannot
        stay within it are refused, others are computed in smaller steps where they must. None: what
        the device should use. Of several models in a process, each keeps to its own limit.
    kv_bits : 8 or 4 keeps keys and values quantized, which takes about a half or a quarter of the
        memory a token. Answers may differ; requests run one after another instead of in a batch.
    visual_tokens : the share to keep of the tokens of an image's tiles and of video frames, above 0
        and at most 1 (None: 1); a request may say otherwise. Fewer are faster and see less detail.
    chat_template : how conversations become prompts, in Jinja, instead of the checkpoint's own.
    draft_model : a smaller LLaVA-OneVision checkpoint with the same tokenizer, which proposes
        tokens to requests with ``draft_tokens``. Its weights are never quantized while they are
        read, and count towards the memory limit.
    sharded : where ``mlx.launch`` has started this process, its ranks hold a share each of the
        language model. Rank 0 is asked. On the others this does not return: they compute what rank
        0 does, and end with SystemExit when it closes the model. Without draft tokens and prompt
        caches. Where a rank is lost, every request fails, and a few seconds later the process ends.
    split : they divide the layers instead, as machines of different memory do: ``"auto"``, so that
        each one's memory is as full as the others', or a share for each rank, as ``(30, 50)``. Then
        rank 0 has the logits.
    adapter : a folder or a Hub id: what fine-tuning with mlx-onevision, mlx-lm or PEFT has changed.
    progress : called on the model's thread with the bytes that have been quantized, and all that
        will be, where ``quantize`` is given.

    Raises:
        OneVisionError: saying in one sentence what is missing or not supported.
        OutOfMemoryError: where the model does not fit into the memory limit.
        RequestError: for a draft model with another vocabulary, or other tiles.
    """
    recipe = while_loading(quantize)
    folder = hub.resolve(model, revision)
    return Model(
        folder,
        name=str(model),
        dtype=dtype,
        recipe=recipe,
        memory_limit=memory_limit,
        kv_bits=kv_bits,
        visual_tokens=visual_tokens,
        chat_template=chat_template,
        draft=None if draft_model is None else hub.resolve(draft_model),
        sharded=sharded,
        split=split,
        adapter=None if adapter is None else hub.resolve_adapter(adapter),
        progress=progress,
    )


class Model(AsyncCalls):
    """A loaded checkpoint. Its weights live on a thread of their own; use it from any thread. As a
    context manager, it is closed at the end.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str | None = None,
        dtype: str | None = None,
        recipe: Recipe | None = None,
        memory_limit: float | None = None,
        kv_bits: int | None = None,
        visual_tokens: float | None = None,
        chat_template: str | None = None,
        draft: Path | None = None,
        sharded: bool = False,
        split: Split | None = None,
        adapter: Path | None = None,
        decoding: Limits | None = None,
        progress: Callable[[int, int], object] = lambda *_: None,
    ) -> None:
        """decoding : what decoding one video may take; see
        :class:`~mlx_onevision.media.decoder.Limits`.
        """
        if visual_tokens is not None:
            check_range("visual_tokens", visual_tokens)
        self.path, self.adapter = folder, adapter
        self.name = name or str(folder)
        self._made = [dtype, str(recipe)] + ([] if kv_bits is None else [f"kv_bits {kv_bits}"])
        self._made += [] if visual_tokens in (None, 1) else [f"visual_tokens {visual_tokens}"]
        self._cached_as = {"dtype": str(dtype), "quantize": str(recipe), "kv_bits": str(kv_bits)}
        self._engine = Engine(
            folder, dtype, recipe, memory_limit, kv_bits, draft, sharded, split, adapter, progress
        )
        self._processor = Processor.from_folder(folder, self._engine.config)
        self._processor.visual_tokens = visual_tokens or 1.0
        self._processor.context = self._engine.context
        self._processor.decoding = decoding
        if draft is not None and not self._processor.tokenizer.agrees_with(draft):
            raise RequestError(
                f"{draft} has another vocabulary than {folder}, so it cannot be its draft model; "
                "use a smaller one of the same family"
            )
        if chat_template is not None:
            self._processor.template = self._processor.template.with_source(chat_template)
            self._made.append(chat_template)
        self._builder = generation.RequestBuilder(
            self._processor, self._engine.defaults, has_draft=draft is not None
        )

    def __repr__(self) -> str:
        made = ", ".join(made for made in self._made[:2] if made not in (None, "None"))
        return f"<Model {self.name}{made and ', '}{made}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def config(self) -> OneVisionConfig:
        return self._engine.config

    @property
    def healthy(self) -> bool:
        """False once the model's thread has died (not merely a request failed): load it again."""
        return self._engine.healthy

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

        Takes what :meth:`stream` takes. A conversation of a batch that cannot be answered has
        ``finish_reason`` "error" and says why in ``error``; the others are answered.
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

        prompt, images, videos : the question, and what it is about (images: paths, URLs, bytes, PIL
            images or uint8 arrays; videos: paths, URLs, bytes, lists of frames or uint8 arrays
            (T, H, W, C)).
        messages : a whole conversation instead, as a list of {"role", "content"}; content is text
            or a list of {"type": "text" | "image" | "video", ...} as the reference takes them.
            Blocks without a source take theirs from ``images`` and ``videos``.
        batch : conversations or prompts instead, of any length, with any media, answered together,
            each as it would be alone, up to the rounding of half precision.
        given : settings, by the names in ``Options``; for a batch they hold for every request.
        options : for a batch, settings of each request, which come before those for all.

        Raises, for a batch in each stream, else before this returns (``check`` can stop the reading
        of media, which happens here):
            RequestError: for an empty prompt or a number out of range.
            MediaError: for an image or a video that cannot be read.
            ContextOverflowError: for a prompt, or more frames, beyond the model's context.
            OutOfMemoryError: for a prompt and an answer beyond the memory limit.
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
        return generation.submit(self._engine, self._processor.tokenizer, request)

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
                own = {**conversation, **given, **settings}
                requests.append(self._builder.build_request(**own))
            except OneVisionError as error:
                requests.append(error)
        return generation.submit_all(self._engine, self._processor.tokenizer, requests)

    @property
    def checkpoint_max_tokens(self) -> int | None:
        """The checkpoint's max_new_tokens, for answers without a limit; None where it has none."""
        return self._engine.defaults.max_new_tokens

    @property
    def samples(self) -> bool:
        """Whether the checkpoint asks for sampled answers where no temperature is given."""
        return self._engine.defaults.do_sample

    def build_request(self, messages: Messages, **given: Unpack[Options]) -> PromptRequest:
        """A conversation for :meth:`submit_all`; settings and errors as in :meth:`stream`."""
        return self._builder.build_request(messages=messages, **given)

    def compile_schema(
        self, json_schema: str | bool | Mapping[str, Any], check: Callable[[], None] = no_check
    ) -> None:
        """Compiles a JSON schema ahead of its first answer. RequestError where it cannot be."""
        self._builder.compile_schema(json_schema, check)

    def submit_all(self, requests: Sequence[PromptRequest]) -> list[Stream]:
        """Starts the answers to prepared requests, which run together; in order."""
        return generation.submit_all(self._engine, self._processor.tokenizer, requests)

    def render(self, messages: Messages, order: Order = "template") -> str:
        """The prompt text that the chat template makes, placeholders unexpanded."""
        return self._processor.render(normalise_messages(messages=messages, unfilled=True), order)

    def prepare(
        self,
        messages: Messages,
        *,
        images: Iterable[ImageSource] | None = None,
        videos: Iterable[VideoSource] | None = None,
        **options: Any,
    ) -> Inputs:
        """Token ids (L,) as the reference makes them, and the pixel tiles of each medium.

        images, videos : those of blocks without a source.
        options : see :meth:`~mlx_onevision.prompt.processor.Processor.prepare`.
        """
        conversation = normalise_messages(messages=messages, images=images, videos=videos)
        return self._processor.prepare(conversation, **options)

    def logits(self, inputs: Inputs, last: int | None = None) -> np.ndarray:
        """Logits of a prepared prompt's positions, all or the last ones: float32 (L, vocab)."""
        return self._engine.logits(inputs, last)

    def embed(
        self,
        items: Iterable[Item],
        space: str = "vision",
        *,
        normalize: bool = True,
        tiling: Tiling = "auto",
        num_frames: int | None = None,
        fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
        cache: MutableMapping[str, Vector] | None = None,
        progress: Callable[[int, int], None] | None = None,
        on_error: Callable[[int, OneVisionError], None] | None = None,
        check: Callable[[], None] = no_check,
    ) -> Embeddings:
        """One vector for each item, float32.

        items : images and videos (paths, URLs or bytes, known by their first bytes; PIL images;
            uint8 arrays, four axes for a video), or typed blocks such as {"type": "text",
            "text": ...}; in the joint space, a list of images is one item.
        space : ``vision`` is for what looks alike, and knows no text. ``joint`` holds text,
            images and videos in one space, and is experimental. See :attr:`Embeddings.note`.
        normalize : to length 1.
        tiling : how the joint space sees images, as in a conversation; "never" is a tenth of the
            work for a large one. Vectors of different tilings are not comparable.
        num_frames, fps : which frames of each video, 32 of a file without; vectors of different
            numbers or rates are not comparable.
        start, end : the part of each video, in seconds; a video block may have its own.
        cache : where vectors are looked up by content and kept; any mapping will do.
        progress : called with how many items are done, and of how many.
        on_error : called with the index of an item that cannot be embedded, which is left out then.
        check : called from several threads while items are read, while the device is waited for,
            and between groups of tiles: what it raises ends the work there.

        Raises:
            OneVisionError: for the first item that cannot be embedded, without ``on_error``.
        """
        name, revision = self._identity
        embedder = Embedder(
            self._engine,
            self._processor,
            space=space,
            model=name,
            revision=revision,
            normalize=normalize,
            tiling=tiling,
            frames=FrameOptions(num_frames, fps, start, end),
            check=check,
        )
        return embedder.embed(items, cache=cache, progress=progress, on_error=on_error)

    def describe_video(
        self,
        video: VideoSource,
        *,
        progress: Callable[[Progress], None] | None = None,
        sidecar: str | Path | None = None,
        force: bool = False,
        **given: Unpack[DescribeOptions],
    ) -> VideoDescription:
        """What a video shows (not its sound), segment by segment, with chapters and a summary.
        Takes what :meth:`stream_description` takes, and ``progress``, called as it goes on.
        """
        with self.stream_description(video, sidecar=sidecar, force=force, **given) as stream:
            for event in stream:
                if progress is not None and isinstance(event, Progress):
                    progress(event)
            return stream.result()

    def stream_description(
        self,
        video: VideoSource,
        *,
        sidecar: str | Path | None = None,
        force: bool = False,
        **given: Unpack[DescribeOptions],
    ) -> DescriptionStream:
        """Describes a video as an iterator of progress, segments, and at last the description.

        video : a path, a URL or bytes.
        sidecar : a file that records what is done, at once. Another run with the same video, model
            and settings goes on from there. In a folder, the file gets a name of its own.
        force : starts over, whatever stands in the sidecar.
        given : settings, by the names in :class:`~mlx_onevision.describe.options.DescribeOptions`.

        Raises, the last three as it is iterated:
            RequestError: for an unknown setting or one out of range.
            RequestError: for a sidecar of another video or model, or of other settings.
            MediaError: for a video that cannot be read; a part of it that cannot is left out.
            ContextOverflowError: for more frames than the model's context holds.
        """
        described, settings = DescribeSettings.of(dict(given))
        name, revision = self._identity
        return DescriptionStream(
            video,
            Captioner(self._engine, self._processor, self._builder.build_request, settings),
            described,
            model=name,
            about={
                "model": [name, revision, *self._made],
                "settings": {**asdict(described), **settings, "questions": prompts_digest()},
            },
            sidecar=None if sidecar is None else Path(sidecar),
            force=force,
        )

    def save_prompt_cache(
        self, path: str | Path, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Writes the KV cache of the conversation that was answered last to a safetensors file,
        readable by its owner alone, with the tokens of the conversation.

        metadata : texts that :meth:`load_prompt_cache` gives back.

        Raises:
            RequestError: where nothing has been answered.
            OSError: where the file cannot be written; an older one is still whole then.
        """
        name, revision = self._identity
        about = {"name": name, "revision": revision, **self._cached_as}
        about["metadata"] = json.dumps(dict(metadata or {}))
        self._engine.save_prompt_cache(Path(path), about)

    def load_prompt_cache(self, path: str | Path) -> tuple[int, dict[str, str]]:
        """Makes the conversation of a file that :meth:`save_prompt_cache` wrote one of those in the
        cache: a prompt that begins as it does, by at least 64 tokens, prefills only the rest, and
        media in it are not encoded. Usage's ``cached_tokens`` says how much of a prompt there was.

        Returns the number of its tokens, and the metadata.

        Raises:
            RequestError: where the file is damaged, or of another model, dtype, quantization or
                kv_bits.
            OutOfMemoryError: where it cannot stay within the memory limit.
            OSError: where it cannot be read.
        """
        name, revision = self._identity

        def accept(about: Mapping[str, str]) -> None:
            if about.get("revision") != revision:
                raise RequestError(
                    f"{path} belongs to another model, {about.get('name')}, and not to {name}; "
                    "name another file, or delete it"
                )
            for setting, own in self._cached_as.items():
                if about.get(setting) != own:
                    raise RequestError(
                        f"{path} was written with {setting} {about.get(setting)}, and the model is "
                        f"loaded with {setting} {own}; load it as it was, or name another file"
                    )

        tokens, about = self._engine.load_prompt_cache(Path(path), accept)
        return tokens, json.loads(about["metadata"])

    @cached_property
    def _identity(self) -> tuple[str, str]:
        return identify(self.path, self.adapter)

    def close(self) -> None:
        """Cancels what is under way and frees the weights. A forgotten model closes itself."""
        self._engine.close()
        self._processor.template.close()
