"""The engine as a backend: this package's own model behind the plugin contract.

Media are read and checked on the request's own thread; the model runs on its one thread, where
requests are batched.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_onevision.errors import OneVisionError
from mlx_onevision.plugins.contract import requests, results
from mlx_onevision.plugins.contract.errors import PluginError, cancelled, to_plugin_error
from mlx_onevision.plugins.contract.requests import DescribeRequest, EmbedRequest, GenerateRequest
from mlx_onevision.plugins.contract.results import DescribeResult, EmbedResult, GenerateResult
from mlx_onevision.plugins.contract.streams import Channel
from mlx_onevision.plugins.service.base import RequestQueue
from mlx_onevision.plugins.service.media_policy import MediaPolicy
from mlx_onevision.plugins.service.service import Limits, Service

if TYPE_CHECKING:
    from mlx_onevision.api import Model
    from mlx_onevision.embed.embeddings import Embeddings
    from mlx_onevision.engine.generation import Generation
    from mlx_onevision.engine.request import PromptRequest
    from mlx_onevision.media.decoder import Limits as DecoderLimits
    from mlx_onevision.network.stages import Split
    from mlx_onevision.sampling import logprobs

# Requests that are prepared at once: work that waits for nothing but the processor. All of them at
# once would be hardly faster, for Python lets one thread run at a time, and the threads that speak
# to the clients would wait behind them.
MAX_PREPARING_REQUESTS = max(2, (os.cpu_count() or 1) // 2)

ITEMS_PER_BATCH = 10  # items that are read and embedded together

# Settings have the library's own names.
GENERATE_SETTINGS = [
    f.name for f in fields(GenerateRequest) if f.name not in ("messages", "stop", "timeout")
]
DESCRIBE_SETTINGS = [f.name for f in fields(DescribeRequest) if f.name not in ("video", "timeout")]


def open_engine(
    model: str | Path = "demo",
    *,
    revision: str | None = None,
    dtype: str | None = None,
    quantize: int | None = None,
    memory_limit: float | None = None,
    kv_bits: int | None = None,
    visual_tokens: float | None = None,
    sharded: bool = False,
    split: "Split | None" = None,
    adapter: str | Path | None = None,
    defaults: Mapping[str, Any] | None = None,
    policy: MediaPolicy | None = None,
    limits: Limits | None = None,
) -> Service:
    """A backend that runs a model in this process; loaded when it is first asked.

    model, revision, dtype, quantize, memory_limit, kv_bits, visual_tokens, sharded, split,
        adapter : as :func:`mlx_onevision.load` takes them. A model that ranks share is not loaded
        again once it was freed.
    defaults : settings of sampling, by their names in a request, for requests that leave them out.
    policy : which files and addresses requests may name. By default none: media come as bytes.
        A program that asks for itself alone takes ``MediaPolicy.trusting()``.
    limits : how much is taken on at once, and for how long.
    """
    folders: list[Path] = []
    found: list[results.ModelInfo] = []

    def folder() -> Path:
        """Resolved once, so that the Hub is asked once; anew where the folder is gone since."""
        from mlx_onevision.checkpoint.hub import resolve

        if not folders or not folders[0].is_dir():
            folders[:] = [resolve(model, revision)]
        return folders[0]

    def adapter_folder() -> Path | None:
        from mlx_onevision.checkpoint.hub import resolve_adapter

        return None if adapter is None else resolve_adapter(adapter)

    def load() -> "_Engine":
        from mlx_onevision.api import Model
        from mlx_onevision.checkpoint.recipes import while_loading
        from mlx_onevision.media.decoder import Limits as DecoderLimits
        from mlx_onevision.media.parallel import Budget

        allowed = policy or MediaPolicy()
        decoding = DecoderLimits(
            allowed.memory, allowed.seconds, processes=Budget(allowed.decoders)
        )
        loaded = Model(
            folder(),
            name=str(model),
            dtype=dtype,
            recipe=while_loading(quantize),
            memory_limit=memory_limit,
            kv_bits=kv_bits,
            visual_tokens=visual_tokens,
            sharded=sharded,
            split=split,
            adapter=adapter_folder(),
            decoding=decoding,
        )
        return _Engine(loaded, allowed, limits or Limits(), decoding, defaults or {})

    def describe() -> results.ModelInfo:
        if not found:
            found.append(model_info(folder(), adapter_folder()))
        return found[0]

    return Service(load, describe, policy=policy, limits=limits)


def import_engine() -> None:
    """Imports everything that running a model takes, which otherwise the first request does."""
    import mlx_onevision.api  # noqa: F401  # pyright: ignore[reportUnusedImport]
    from mlx_onevision.engine.decode import import_mlx_lm

    import_mlx_lm()


class _Engine:
    """A loaded model; see :class:`~mlx_onevision.plugins.service.service.LoadedModel`."""

    def __init__(
        self,
        model: "Model",
        policy: MediaPolicy,
        limits: Limits,
        decoding: "DecoderLimits",
        defaults: Mapping[str, Any],
    ) -> None:
        self._model, self._policy, self._decoding = model, policy, decoding
        self._defaults = {name: value for name, value in defaults.items() if value is not None}
        self._default_max_tokens = limits.default_for(model.checkpoint_max_tokens)
        self._preparing = RequestQueue(MAX_PREPARING_REQUESTS, sys.maxsize)

    @property
    def healthy(self) -> bool:
        return self._model.healthy

    def generate(self, request: GenerateRequest, channel: Channel) -> GenerateResult:
        channel.put(results.ProgressEvent("preparing"))
        if request.json_schema is not None:  # refused before anything is read
            self._model.compile_schema(request.json_schema, channel.check)
        question = self._question(request, channel)
        channel.check()
        channel.put(results.ProgressEvent("answering"))
        (stream,) = self._model.submit_all([question])
        del question  # and with it the tiles, once they are encoded
        channel.at_end(stream.cancel)
        logprobs: list[results.TokenLogprob] = []
        for piece in stream:
            new = tuple(map(_token_logprob, stream.logprobs[len(logprobs) :]))
            logprobs += new
            channel.put(results.TextEvent(piece, logprobs=new))
        return _result(stream.result(), None if request.logprobs is None else tuple(logprobs))

    def _question(self, request: GenerateRequest, channel: Channel) -> "PromptRequest":
        given = self._settings(request, GENERATE_SETTINGS)
        if request.logit_bias is not None:
            given["logit_bias"] = {one.token: one.bias for one in request.logit_bias}
        if request.max_tokens is None:
            given["max_tokens"] = self._default_max_tokens
        videos = any(medium.kind == "video" for medium in request.media)
        with _MediaReader(self._policy, self._decoding, channel) as reader:
            read = {id(medium): reader.of(medium) for medium in request.media}
            messages = [
                {
                    "role": message.role,
                    "content": [
                        {"type": part.kind, part.kind: read[id(part)]}
                        if isinstance(part, requests.Media)
                        else {"type": "text", "text": part}
                        for part in message.parts
                    ],
                }
                for message in request.messages
            ]
            # A video is decoded by another process: who waits for it must not hold a slot.
            with nullcontext() if videos else self._preparing.slot(channel):
                question = self._model.build_request(
                    messages, check=channel.check, stop=tuple(request.stop), **given
                )
        for medium in question.inputs.media:
            if medium.video is not None:
                self._policy.check_frames(len(medium.tiles))
        return question

    def _settings(
        self, request: GenerateRequest | DescribeRequest, names: Sequence[str]
    ) -> dict[str, Any]:
        """What the request says of them, else the backend's default."""
        given = {name: getattr(request, name) for name in names}
        silent = (name for name in self._defaults if given.get(name) is None)
        return given | {name: self._defaults[name] for name in silent}

    def embed(self, request: EmbedRequest, channel: Channel) -> EmbedResult:
        total = len(request.items)
        parts: list[Embeddings] = []
        # An empty request still runs once, so that the empty result has the right ``dim``.
        for first in range(0, total or 1, ITEMS_PER_BATCH):
            channel.check()
            channel.put(results.ProgressEvent("embedding", first, total))
            parts.append(self._embedded(request, first, channel))
        vectors: list[list[float]] = [v for part in parts for v in part.vectors.tolist()]
        names = [field.name for field in fields(EmbedResult) if field.name != "vectors"]
        same = {name: getattr(parts[0], name) for name in names}
        return EmbedResult(vectors=tuple(map(tuple, vectors)), **same)

    def _embedded(self, request: EmbedRequest, first: int, channel: Channel) -> "Embeddings":
        """A group of items; no more of them are ever held at once."""
        with _MediaReader(self._policy, self._decoding, channel) as reader:
            items: list[Any] = []
            for number, item in enumerate(
                request.items[first : first + ITEMS_PER_BATCH], first + 1
            ):
                channel.check()
                try:
                    items.append(reader.item(item))
                except (PluginError, OneVisionError) as error:
                    raise to_plugin_error(error).of(f"item {number}") from None

            def refuse(index: int, error: OneVisionError) -> None:
                # It says which item of the group it was; the host knows them by their own numbers.
                found = to_plugin_error(error)
                plain = found.message.removeprefix(f"item {index + 1}: ")
                whole = PluginError(found.code, plain, found.hint)
                raise whole.of(f"item {first + index + 1}")

            return self._model.embed(
                items,
                request.space,
                normalize=request.normalize,
                tiling=request.tiling,
                on_error=refuse,
                check=channel.check,
            )

    def describe_video(self, request: DescribeRequest, channel: Channel) -> DescribeResult:
        from mlx_onevision.describe.formats import Segment as LibrarySegment
        from mlx_onevision.describe.pipeline import Progress

        given = self._settings(request, DESCRIBE_SETTINGS)
        segments: list[results.Segment] = []
        with _MediaReader(self._policy, self._decoding, channel) as reader:
            channel.put(results.ProgressEvent("preparing"))
            video = reader.of(request.video)
            stream = reader.enter_context(self._model.stream_description(video, **given))
            channel.at_end(stream.cancel)
            for event in stream:
                if isinstance(event, Progress):
                    channel.put(results.ProgressEvent(event.stage, event.done, event.total))
                elif isinstance(event, LibrarySegment):
                    what = (event.start, event.end, event.text, event.frames)
                    segments.append(results.Segment(len(segments), *what))
                    channel.put(results.SegmentEvent(segments[-1]))
            found = stream.result()
        return DescribeResult(
            duration=found.duration,
            segments=tuple(segments),
            summary=found.summary,
            chapters=tuple(
                results.Chapter(chapter.start, chapter.title) for chapter in found.chapters
            ),
            warnings=found.warnings,
        )

    def close(self) -> None:
        self._model.close()


class _MediaReader(ExitStack):
    """Reads the media of one request, and closes their files at the end."""

    def __init__(self, policy: MediaPolicy, decoding: "DecoderLimits", channel: Channel) -> None:
        from mlx_onevision.media.image import PixelCount

        super().__init__()
        self._policy, self._channel = policy, channel
        self._decoding = decoding if policy.isolated else None
        self._together = PixelCount(4 * policy.pixels)

    def item(self, item: str | requests.Media | requests.Group) -> Any:
        """What :meth:`mlx_onevision.model.Model.embed` takes; errors are those of :meth:`of`."""
        if isinstance(item, str):
            return {"type": "text", "text": item}
        if isinstance(item, requests.Media):
            return {"type": item.kind, item.kind: self.of(item)}
        return [self.item(medium) for medium in item.media]

    def of(self, medium: requests.Media) -> Any:
        """Of an image its file, which is decoded when its turn comes; of a video its bytes or its
        open file. Raises PluginError: when the policy does not allow it, or the request has ended;
        OneVisionError: when it cannot be read.
        """
        self._channel.check()
        source = self._policy.open(medium)
        if medium.kind == "video":
            return source if isinstance(source, bytes) else self.enter_context(source)
        from mlx_onevision.media.image import EncodedImage
        from mlx_onevision.media.sources import open_source

        with nullcontext() if isinstance(source, bytes) else source:
            data, name = open_source(source, "image")
        assert isinstance(data, bytes)
        return EncodedImage(
            data,
            name,
            self._policy.pixels,
            together=self._together,
            limits=self._decoding,
            check=self._channel.check,
        )


def _token_logprob(token: "logprobs.TokenLogprob") -> results.TokenLogprob:
    top = (results.TopLogprob(other.token, other.data, other.logprob) for other in token.top)
    return results.TokenLogprob(token.token, token.data, token.logprob, tuple(top))


def _result(
    answer: "Generation", logprobs: tuple[results.TokenLogprob, ...] | None
) -> GenerateResult:
    if answer.finish_reason not in ("stop", "length"):
        raise cancelled()
    return GenerateResult(
        text=answer.text,
        finish_reason=answer.finish_reason,
        usage=results.Usage(
            **{field.name: getattr(answer.usage, field.name) for field in fields(results.Usage)}
        ),
        notes=answer.notes,
        logprobs=logprobs,
    )


def model_info(folder: Path, adapter: Path | None = None) -> results.ModelInfo:
    """Raises OneVisionError when the folder holds no model."""
    from mlx_onevision.checkpoint.hub import identify
    from mlx_onevision.checkpoint.load import read_config
    from mlx_onevision.config.model import OneVisionConfig
    from mlx_onevision.embed.embedder import described
    from mlx_onevision.embed.embeddings import NOTES
    from mlx_onevision.sampling.grammar import available

    config = OneVisionConfig.from_dict(read_config(folder))
    name, commit = identify(folder, adapter)
    capabilities: tuple[results.Capability, ...]
    capabilities = ("generate", "embed", "describe_video", "images", "videos", "logprobs")
    hidden = config.text_config.hidden_size
    wide = config.vision_config.hidden_size * len(config.feature_layers)
    return results.ModelInfo(
        id=name,
        revision=commit,
        context=config.text_config.max_position_embeddings,
        quantization=described(config.quantization),
        capabilities=(*capabilities, "json_schema") if available() else capabilities,
        spaces=(
            results.Space("vision", wide, ("image", "video"), trained=False, note=NOTES["vision"]),
            results.Space(
                "joint", hidden, ("text", "image", "video"), trained=False, note=NOTES["joint"]
            ),
        ),
    )
