"""Vectors of images, videos and texts; see :class:`~mlx_onevision.embed.embeddings.Embeddings`.

``vision``: the mean over the patches of the tower's features, of the base view (the whole image
squeezed into one tile); of a video, the mean over its frames. The number of frames is part of the
method; which part of a video is shown is part of the item.

``joint``: the last hidden state of a prompt of E5-V (arXiv 2407.12580): "Summary above image in one
word:". Checkpoints that were trained to embed have prompts of their own, but none that is known
here names them in its files (LLaVE's stand on its model card), so all get the same prompts.

Images are read and tiled on a few threads, while the device works on the ones before them.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.config.quantization import Quantization
from mlx_onevision.embed.embeddings import SPACES, Embeddings
from mlx_onevision.engine.engine import Engine
from mlx_onevision.errors import (
    CancelledError,
    ContextOverflowError,
    OneVisionError,
    RequestError,
)
from mlx_onevision.media.frame_sampling import DEFAULT_FRAMES, FrameOptions
from mlx_onevision.media.image import ImageSource, reading_image
from mlx_onevision.media.resize import resize
from mlx_onevision.media.sources import is_video
from mlx_onevision.media.video import load_video, no_check
from mlx_onevision.prompt.messages import normalise_messages
from mlx_onevision.prompt.processor import Inputs, Medium, Processor, Tiling

Item: TypeAlias = "ImageSource | Mapping[str, Any] | Medium | Sequence[Any]"
"""An image or a video as everywhere; a typed block of a conversation; or several in a list."""
Vector: TypeAlias = NDArray[np.float32]

PROMPT = "Summary above {} in one word:"
NOUNS = {"text": "sentence", "image": "image", "video": "video"}

GROUP = 10  # items prepared and encoded together: as many tiles as fill the tower
THREADS = 4
LONGEST_NAME = 4096  # characters
POLL_SECONDS = 0.1  # between two checks for a cancellation while other requests run
PART = ("start", "end")  # which part of a video an item is; a video block may say it


@dataclass(frozen=True)
class _Prepared:
    """One item, ready for the model: its tiles for ``vision``, its prompt for ``joint``."""

    number: int
    """From 1 on, as in messages."""
    name: str
    key: str
    """Equal for what gives equal vectors."""
    medium: Medium | None = None
    inputs: Inputs | None = None


_Outcome: TypeAlias = tuple[int, str, Vector | OneVisionError]
"""Number and name of an item, and its vector or why there is none."""


class Embedder:
    """Turns items into vectors of one space.

    space, normalize, tiling, frames, check : see :meth:`mlx_onevision.model.Model.embed`.
    model, revision : as :func:`~mlx_onevision.checkpoint.hub.identify` returns them.
    """

    def __init__(
        self,
        engine: Engine,
        processor: Processor,
        *,
        space: str,
        model: str,
        revision: str,
        normalize: bool = True,
        tiling: str = "auto",
        frames: FrameOptions | None = None,
        check: Callable[[], None] = no_check,
    ) -> None:
        if space not in SPACES:
            raise RequestError(f"space is {space!r}; it must be {' or '.join(SPACES)}")
        if tiling not in ("auto", "always", "never"):
            raise RequestError(f"tiling is {tiling!r}; it must be auto, always or never")
        self._engine, self._processor, self._check = engine, processor, check
        self._tiling: Tiling = tiling
        given = vars(frames or FrameOptions())
        self._frames = processor.video_config.frames.over(
            {name: value for name, value in given.items() if value is not None}
        )
        config = engine.config
        layers = config.feature_layers
        edge = processor.image_config.size
        if space == "vision":
            dim = config.vision_config.hidden_size * len(layers)
            method = f"mean of tower features {list(layers)} over the {edge}x{edge} base view"
        else:
            dim = config.text_config.hidden_size
            method = f"last hidden state under the E5-V prompts, tiling {tiling}"
        rate, number = self._frames.fps, self._frames.num_frames or DEFAULT_FRAMES
        method += f", {number} frames a video" if rate is None else f", {rate:g} frames a second"
        self._empty = Embeddings(
            vectors=np.zeros((0, dim), np.float32),
            space=space,
            model=model,
            revision=revision,
            quantization=described(config.quantization),
            method=method,
            normalized=normalize,
            names=(),
        )
        mark = {**self._empty.provenance, "normalized": None}
        self._mark = blake2b(repr(mark).encode(), digest_size=20).digest()

    def embed(
        self,
        items: Iterable[Item],
        *,
        cache: MutableMapping[str, Vector] | None = None,
        progress: Callable[[int, int], None] | None = None,
        on_error: Callable[[int, OneVisionError], None] | None = None,
    ) -> Embeddings:
        """The vectors of ``items``, in order; see :meth:`mlx_onevision.model.Model.embed`."""
        items = _listed(items)
        names: list[str] = []
        vectors: list[Vector] = []
        done = 0
        for group in self._vectors(items, cache):
            for number, name, outcome in group:
                try:
                    if isinstance(outcome, OneVisionError):
                        raise outcome
                    vectors.append(self._normalized(number, outcome))
                    names.append(name)
                except OneVisionError as error:
                    if on_error is None:
                        raise
                    on_error(number - 1, error)
            done += len(group)
            if progress is not None:
                progress(done, len(items))
        found = np.stack(vectors) if vectors else self._empty.vectors
        return replace(self._empty, vectors=found, names=tuple(names))

    def _vectors(
        self, items: Sequence[Item], cache: MutableMapping[str, Vector] | None
    ) -> Iterator[list[_Outcome]]:
        """Groups of outcomes; the next group is prepared while the device works on one."""
        numbered = list(enumerate(items, 1))
        finish: Callable[[], list[_Outcome]] | None = None
        with ThreadPoolExecutor(THREADS, "mlx-onevision-tiles") as pool:
            for start in range(0, len(items), GROUP):
                prepared = list(pool.map(self._prepared, numbered[start : start + GROUP]))
                started = self._start(prepared, cache)
                if finish is not None:
                    yield finish()
                finish = started
            if finish is not None:
                yield finish()

    def _start(
        self,
        prepared: Sequence[_Prepared | _Outcome],
        cache: MutableMapping[str, Vector] | None,
    ) -> Callable[[], list[_Outcome]]:
        """Sends a group to the model; the function that is returned waits for it."""
        good = [entry for entry in prepared if isinstance(entry, _Prepared)]
        known: dict[str, Vector] = {}
        if cache is not None:
            known = {entry.key: cache[entry.key] for entry in good if entry.key in cache}
        missing = {entry.key: entry for entry in good if entry.key not in known}
        # Images and videos may be normalised differently; one call of the tower does it in one way.
        batches: dict[bytes, list[_Prepared]] = {}
        for entry in missing.values():
            table = b"" if entry.medium is None else entry.medium.normalization.tobytes()
            batches.setdefault(table, []).append(entry)
        futures = [(entries, self._submit(entries)) for entries in batches.values()]

        def finish() -> list[_Outcome]:
            for entries, future in futures:
                pooled = _pooled(entries, self._awaited(future))
                known.update(zip((entry.key for entry in entries), pooled, strict=True))
            if cache is not None:
                cache.update((key, known[key]) for key in missing)
            return [
                (entry.number, entry.name, known[entry.key])
                if isinstance(entry, _Prepared)
                else entry
                for entry in prepared
            ]

        return finish

    def _awaited(self, future: "Future[Vector]") -> Vector:
        try:
            while True:
                self._check()
                # Not result(timeout), whose TimeoutError looks like one of the work's own.
                if wait((future,), POLL_SECONDS).done:
                    return future.result()
        except BaseException:
            future.cancel()  # nothing, once it has begun: then it notices by itself
            raise

    def _submit(self, entries: Sequence[_Prepared]) -> "Future[Vector]":
        if self._empty.space == "joint":
            prompts = [entry.inputs for entry in entries if entry.inputs is not None]
            return self._engine.embed_prompts(prompts, self._check)
        media = [entry.medium for entry in entries if entry.medium is not None]
        tiles = np.concatenate([_views(medium) for medium in media])
        return self._engine.embed_tiles(tiles, media[0].normalization, self._check)

    def _normalized(self, number: int, vector: Vector) -> Vector:
        length = np.linalg.norm(vector)
        if not np.isfinite(length) or length == 0:
            raise OneVisionError(
                f"item {number}: the model's features are not finite; load it with dtype float32"
            )
        return np.float32(1) / length * vector if self._empty.normalized else vector

    def _prepared(self, numbered: tuple[int, Item]) -> _Prepared | _Outcome:
        """One item, on a thread of the pool."""
        number, item = numbered
        name = f"item {number}"
        self._check()
        try:
            if self._empty.space == "vision":
                name, medium = self._medium(item, name)
                return _Prepared(number, name, self._key(medium.key), medium=medium)
            blocks = self._blocks(item)
            name = _name(blocks, name)
            inputs = self._prompt(blocks)
            key = self._key(inputs.input_ids.tobytes().hex(), *(m.key for m in inputs.media))
            return _Prepared(number, name, key, inputs=inputs)
        except CancelledError:
            raise
        except OneVisionError as error:
            return number, name, type(error)(f"item {number}: {error}")

    def _blocks(self, item: Item) -> list[dict[str, Any]]:
        blocks = item_blocks(item)
        for name in ("num_frames", "fps", "ends"):
            if any(name in block for block in blocks):
                instead = "leave it out" if name == "ends" else f"give {name} to embed"
                raise RequestError(
                    f"a video has {name} of its own, but vectors are comparable only where all "
                    f"have the same; {instead}"
                )
        return blocks

    def _medium(self, item: Item, name: str) -> tuple[str, Medium]:
        if isinstance(item, Medium):
            if item.kind == "image" and item.packing is None:
                raise RequestError("this medium is a padded image, which has no base view")
            return name, item
        blocks = self._blocks(item)
        name = _name(blocks, name)
        kinds = [block["type"] for block in blocks]
        if "text" in kinds:
            raise RequestError("the vision space has no place for text; take space='joint'")
        if len(kinds) != 1:
            raise RequestError(
                f"the vision space takes one image or video an item, not {len(kinds)}; "
                "take space='joint' for several"
            )
        if kinds == ["video"]:
            pixels = self._processor.video_config.pixels
            shown = self._frames.over({k: v for k, v in blocks[0].items() if k in PART})
            clip = load_video(
                blocks[0]["video"],
                pixels.size,
                shown,
                limits=self._processor.decoding,
                check=self._check,
            )
            return name, Medium("video", clip.tiles, None, None, 0, pixels, clip)
        config = self._processor.image_config
        with reading_image(blocks[0]["image"]) as pixels:
            tile = resize(pixels, (config.size, config.size))[None]
            size = (pixels.shape[0], pixels.shape[1])
            del pixels
        return name, Medium("image", tile, size, None, 0, config)

    def _prompt(self, blocks: Sequence[dict[str, Any]]) -> Inputs:
        kinds = {block["type"] for block in blocks}
        if len(kinds) != 1:
            raise RequestError(
                f"an item holds {' and '.join(sorted(kinds))}; it must be of one kind"
            )
        question = PROMPT.format(NOUNS[kinds.pop()])
        if blocks[0]["type"] == "text":
            words = "\n".join(block["text"] for block in blocks)
            content = [{"type": "text", "text": f"{words}\n{question}"}]
        else:
            content = [*blocks, {"type": "text", "text": question}]
        inputs = self._processor.prepare(
            [{"role": "user", "content": content}],
            tiling=self._tiling,
            answer=1,
            check=self._check,
            **vars(self._frames),
        )
        length = len(inputs.input_ids)
        limit = self._engine.config.text_config.max_position_embeddings
        if length > limit:
            raise ContextOverflowError(
                f"it takes {length} tokens, but the model's context holds {limit}; "
                "use fewer media or a shorter text"
            )
        self._engine.check_size(inputs, 1)
        return inputs

    def _key(self, *parts: str) -> str:
        digest = blake2b(self._mark, digest_size=20)
        digest.update("/".join(parts).encode())
        return digest.hexdigest()


def _listed(items: Iterable[Item]) -> list[Item]:
    """RequestError where it is one item; strings and arrays could be iterated over, too."""
    given: Any = items
    one = isinstance(given, str | bytes | Mapping | os.PathLike) or hasattr(given, "shape")
    try:
        iterator = iter(items)
    except TypeError:  # a PIL image, a Medium
        iterator = None
    if one or iterator is None:
        raise RequestError(f"items is one {type(items).__name__}; give a list of items")
    return list(iterator)


def _pooled(entries: Sequence[_Prepared], rows: Vector) -> list[Vector]:
    """One vector an item; of a video's frames, the mean."""
    counts = [1 if e.medium is None else len(_views(e.medium)) for e in entries]
    ends = np.cumsum(counts)
    return [
        rows[end - count] if count == 1 else rows[end - count : end].mean(axis=0)
        for count, end in zip(counts, ends, strict=True)
    ]


def _views(medium: Medium) -> NDArray[np.uint8]:
    """The tiles that a medium's vector is the mean of: every frame, or the base view."""
    return medium.tiles if medium.kind == "video" else medium.tiles[:1]


def described(quantization: Quantization | None) -> str | None:
    """How a checkpoint is quantized, in words; modules that differ from the rest included."""
    if quantization is None:
        return None
    specs = {quantization.default, *filter(None, quantization.modules.values())}
    return ", ".join(
        sorted(f"{spec.bits} bits in groups of {spec.group_size} ({spec.mode})" for spec in specs)
    )


def item_blocks(item: Any) -> list[dict[str, Any]]:
    """An item as the normalised content of a message.

    Raises:
        RequestError: for an empty list, and blocks of another form.
    """
    parts = cast(Sequence[Any], item) if isinstance(item, list | tuple) else [item]
    content: list[Mapping[str, Any]] = []
    for part in parts:
        kind = "video" if is_video(part) else "image"
        is_block = isinstance(part, Mapping)
        content.append(cast(Mapping[str, Any], part) if is_block else {"type": kind, kind: part})
    if not content:
        raise RequestError("it is an empty list")
    return normalise_messages(messages=[{"role": "user", "content": content}])[0]["content"]


def _name(blocks: Sequence[Mapping[str, Any]], otherwise: str) -> str:
    """Paths, URLs and texts as they were given; other things have no name."""
    names: list[str] = []
    for block in blocks:
        value: Any = block[block["type"]]
        if not isinstance(value, str | os.PathLike):
            return otherwise
        name = str(os.fspath(cast(str | os.PathLike[str], value)))
        if len(name) > LONGEST_NAME or name.startswith("data:"):
            return otherwise
        names.append(name)
    return " + ".join(names)
