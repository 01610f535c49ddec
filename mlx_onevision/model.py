"""The library: a loaded model, which any thread may use."""

import json
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Self, Unpack

from mlx_onevision.asynchronous import AsyncCalls
from mlx_onevision.checkpoint.hub import identify
from mlx_onevision.checkpoint.recipes import Recipe
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.describe.formats import VideoDescription
from mlx_onevision.describe.options import DescribeOptions, DescribeSettings
from mlx_onevision.describe.outline import prompts_digest
from mlx_onevision.describe.pipeline import Captioner, Progress
from mlx_onevision.describe.stream import DescriptionStream
from mlx_onevision.embed.embedder import Embedder, Item, Vector
from mlx_onevision.embed.embeddings import Embeddings
from mlx_onevision.engine.engine import Engine
from mlx_onevision.engine.generation import RequestBuilder
from mlx_onevision.errors import OneVisionError, RequestError
from mlx_onevision.media.decoder import Limits
from mlx_onevision.media.frame_sampling import FrameOptions
from mlx_onevision.media.video import VideoSource, no_check
from mlx_onevision.network.stages import Split
from mlx_onevision.prompt.processor import Processor, Tiling
from mlx_onevision.prompt_calls import PromptCalls
from mlx_onevision.sampling.ranges import check_range


class Model(PromptCalls, AsyncCalls):
    """A loaded checkpoint, which :func:`~mlx_onevision.api.load` returns.

    Its weights live on a thread of their own; every method may be called from any thread, and what
    is asked at the same time is answered together. As a context manager, it is closed at the end.

    - ``generate``, ``stream``: answers, whole or as pieces of text; ``agenerate``, ``astream`` on
      asyncio.
    - ``embed``, ``aembed``: vectors of images, videos and texts.
    - ``describe_video``, ``stream_description``: what happens in a video.
    - ``prepare``, ``logits``, ``render``: a prompt's ids and pixels, its logits, its text.
    - ``save_prompt_cache``, ``load_prompt_cache``: the KV cache of a conversation, in a file.
    - ``path``, ``adapter``, ``name``: the folders of the checkpoint and of its adapter, and the
      name that it was opened by.

    The parameters are for programs that have found the folders themselves; others use ``load``.

    folder, name : the checkpoint's folder, and what to call it.
    dtype, memory_limit, kv_bits, visual_tokens, chat_template, sharded, split, progress : see
        ``load``.
    recipe : how to quantize the weights while they are read.
    draft, adapter : the folders of a draft model and of an adapter.
    decoding : what decoding one video may take in memory and time; see
        :class:`~mlx_onevision.media.decoder.Limits`.

    Raises:
        OneVisionError: the errors of ``load``.
        RequestError: for a draft model with another vocabulary.
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
        progress: Callable[[int, int], object] = lambda done, total: None,
    ) -> None:
        if visual_tokens is not None:
            check_range("visual_tokens", visual_tokens)
        self.path, self.adapter = folder, adapter
        self.name = name or str(folder)
        # What generated texts depend on, and what a KV cache does.
        self._made: list[str | None] = [dtype, str(recipe)]
        self._made += [] if kv_bits is None else [f"kv_bits {kv_bits}"]
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
        builder = RequestBuilder(
            self._processor, self._engine.defaults, has_draft=draft is not None
        )
        super().__init__(self._engine, self._processor, builder)

    def __repr__(self) -> str:
        made = ", ".join(made for made in self._made[:2] if made not in (None, "None"))
        return f"<Model {self.name}{made and ', '}{made}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def config(self) -> OneVisionConfig:
        """The checkpoint's configuration: sizes of the tower and the language model, token ids."""
        return self._engine.config

    @property
    def healthy(self) -> bool:
        """False once the model's thread has died, or has not moved for three minutes while there
        was work (not where a request has failed): load it again. Ask every second or so.
        """
        return self._engine.healthy

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
        """One vector for each item: ``vectors`` of what is returned are float32 (items, dim).

        items : images and videos (paths, URLs or bytes, known by their first bytes; PIL images;
            uint8 arrays, four axes for a video), or typed blocks such as {"type": "text",
            "text": ...}; in the joint space, a list of images is one item.
        space : ``vision`` is for what looks alike, and knows no text. ``joint`` holds text,
            images and videos in one space, and is experimental. See :attr:`Embeddings.note`.
        normalize : scales every vector to length 1.
        tiling : how the joint space sees images, as in a conversation; "never" is a tenth of the
            work for a large one. Vectors of different tilings are not comparable.
        num_frames, fps : how many frames of each video, or how many a second; 32 of a file
            without. Vectors of different numbers or rates are not comparable.
        start, end : the part of each video, in seconds; a video block may have its own.
        cache : where vectors are looked up by content and stored; any mutable mapping.
        progress : called with how many items are done, and of how many.
        on_error : called with the index of an item that cannot be embedded, which is left out then.
        check : called from several threads while items are read, while the device is waited for,
            and between groups of tiles: what it raises ends the work there.

        Raises:
            RequestError: for another space or tiling, and numbers out of range.
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

        video, sidecar, force, given : as :meth:`stream_description` takes them.
        progress : called with the stage, and how much of it is done, as it goes on.

        Raises:
            OneVisionError: as :meth:`stream_description` does.
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
        given : settings, by the names in :class:`DescribeOptions`.

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

        path : the file; one that is there is replaced.
        metadata : texts that :meth:`load_prompt_cache` gives back.

        Raises:
            RequestError: where nothing has been answered yet.
            OSError: where the file cannot be written; an older one is still whole then.
        """
        about = {**self._cache_settings, "metadata": json.dumps(dict(metadata or {}))}
        self._engine.save_prompt_cache(Path(path), about)

    def load_prompt_cache(self, path: str | Path) -> tuple[int, dict[str, str]]:
        """Makes the conversation of a file that :meth:`save_prompt_cache` wrote one of those in the
        cache: a prompt that begins as it does, by at least 64 tokens, prefills only the rest, and
        media in it are not encoded. Usage's ``cached_tokens`` says how much of a prompt there was.

        path : the file.

        Returns the number of its tokens, and the metadata.

        Raises:
            RequestError: where the file is damaged, or of another model, dtype, quantization or
                kv_bits.
            OutOfMemoryError: where it cannot stay within the memory limit.
            OSError: where it cannot be read.
        """
        tokens, about = self._engine.load_prompt_cache(Path(path), self._cache_settings)
        return tokens, json.loads(about["metadata"])

    @property
    def _cache_settings(self) -> dict[str, str]:
        """What a KV cache depends on."""
        name, revision = self._identity
        return {"name": name, "revision": revision, **self._cached_as}

    @cached_property
    def _identity(self) -> tuple[str, str]:
        return identify(self.path, self.adapter)

    def close(self) -> None:
        """Cancels what is under way and frees the weights. A forgotten model closes itself."""
        self._engine.close()
        self._processor.template.close()
