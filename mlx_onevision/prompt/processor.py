"""From a conversation to the model's inputs: ids, with a placeholder for each embedding of a
medium.

The ids are those of transformers' ``LlavaOnevisionProcessor`` (processing_llava_onevision.py,
``apply_chat_template(tokenize=True)``), as long as no text contains a special string; those stay
text here. As there, a single image in a conversation is cut into tiles, and of several each becomes
one tile. A checkpoint of the original code may have another setting for a single image, and may
have the times of a video's frames written behind it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.config.json_fields import is_object, shown
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.config.preprocessor import ImageConfig
from mlx_onevision.errors import ConfigError, RequestError
from mlx_onevision.files import read_json
from mlx_onevision.media.anyres import (
    Packing,
    Size,
    VideoPacking,
    plan_packing,
    single_tile_tokens,
    thinned,
)
from mlx_onevision.media.cache import TileCache, digest_of
from mlx_onevision.media.decoder import Limits
from mlx_onevision.media.image import identify_image
from mlx_onevision.media.parallel import parallel_map
from mlx_onevision.media.tiles import (
    normalization_table,
    pad_to_square_tile,
    pixel_values,
    squeeze_to_tile,
    tile_image,
)
from mlx_onevision.media.video import VideoConfig, VideoFrames, load_video
from mlx_onevision.prompt.chat_template import ChatTemplate, Order, Segment
from mlx_onevision.prompt.messages import Message, sources, video_blocks
from mlx_onevision.prompt.tokenizer import Tokenizer
from mlx_onevision.prompt.video_budget import (
    ContextBudget,
    load_videos,
    time_instruction,
    with_times,
)
from mlx_onevision.sampling.ranges import check_range

Tiling = Literal["auto", "always", "never"]
# How an image becomes tiles: a grid of them, or one, squeezed or padded to a square.
Shape = Literal["grid", "square", "pad"]
CACHE_BYTES = 64 << 20  # some photos of 12 megapixels, or four videos of 32 frames


@dataclass(frozen=True, eq=False)
class Medium:
    """One image or video as the tower takes it, and the number of its embeddings in the prompt."""

    kind: Literal["image", "video"]
    tiles: NDArray[np.uint8]
    """(n, S, S, 3): tiles of an image, the base tile first, or frames of a video."""
    size: Size | None
    """(height, width) of an image in pixels, before it was resized."""
    packing: Packing | VideoPacking | None
    """How a tiled image or a video is packed; None for an image of one tile."""
    tokens: int
    config: ImageConfig
    video: VideoFrames | None = None
    """The frames of a video."""
    key: str = field(init=False)
    """Equal for media of equal embeddings in one model: a hash of the tiles and of all settings
    that the embeddings depend on.
    """

    def __post_init__(self) -> None:
        # Not lazily: it is computed on the thread that prepares, and not on the inference thread.
        shape = (self.kind, self.size, self.packing, self.tokens, self.tiles.shape)
        pixels = (self.config.image_mean, self.config.image_std, self.config.rescale_factor)
        known = self.video is not None and self.video.tiles is self.tiles
        tiles = self.video.digest if self.video and known else digest_of(self.tiles)
        digest = sha256(repr((shape, pixels)).encode() + tiles)
        object.__setattr__(self, "key", digest.hexdigest())

    @property
    def normalization(self) -> NDArray[np.float32]:
        """float32 (256, 3): the pixel value of each level in each channel."""
        return normalization_table(self.config)

    @property
    def pixel_values(self) -> NDArray[np.float32]:
        """float32 (n, 3, S, S): the tiles as the reference's processor returns them, without the
        padding of a batch.
        """
        return pixel_values(self.tiles, self.config)


@dataclass(frozen=True, eq=False)
class Inputs:
    """A prompt, ready for the model.

    input_ids : int32 (L,), a placeholder id for each embedding of each medium, text ids between.
    media : images and videos in the order of their placeholders: uint8 ``tiles`` (n, S, S, 3),
        float32 ``pixel_values`` (n, 3, S, S), and the number of their ``tokens``.
    prompt : the text that the chat template made, each medium one placeholder.
    learned : bool (L,), of a prompt in given segments, the ids that carry loss; else empty.
    """

    input_ids: NDArray[np.int32]
    media: tuple[Medium, ...]
    prompt: str
    learned: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what of the videos is not as it was asked for."""
        return tuple(note for medium in self.media if medium.video for note in medium.video.notes)


class Processor:
    """The tokenizer, the chat template and the image settings of a checkpoint."""

    def __init__(
        self,
        config: OneVisionConfig,
        image_config: ImageConfig,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        video_config: VideoConfig | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Raises ConfigError where the tokenizer has another id for a placeholder than ``config``.

        cache_bytes : of tiles that are kept, for media that come again.
        """
        self.config = config
        self.image_config = image_config
        self.video_config = video_config or VideoConfig(image_config)
        self.tokenizer = tokenizer
        self.template = template
        self.cache = TileCache(cache_bytes)
        self.visual_tokens = 1.0  # where :meth:`prepare` is given none
        self.context = config.text_config.max_position_embeddings  # or fewer that memory holds
        self.decoding: Limits | None = None  # of videos; None for the usual ones
        self._placeholders = {
            "<image>": config.image_token_index,
            "<video>": config.video_token_index,
        }
        for token, index in self._placeholders.items():
            known, taken = tokenizer.token_to_id(token), tokenizer.id_to_token(index)
            # The original checkpoints' tokenizers know no placeholder: theirs is not a token.
            if known not in (index, None) or taken not in (token, None):
                raise ConfigError(
                    f"config.json has id {index} for {token}; the tokenizer has {known} for it and "
                    f"{shown(taken)} for {index}"
                )
        self._specials = {**tokenizer.specials, **self._placeholders}

    @classmethod
    def from_folder(cls, folder: Path, config: OneVisionConfig) -> "Processor":
        """From a checkpoint's files.

        Raises:
            CheckpointError: for a file that cannot be read.
            ConfigError: for a setting that is not supported, or differs from config.json.
        """
        settings = read_json(folder / "processor_config.json") or {}
        _check(settings, config)
        images = settings.get("image_processor") or read_json(folder / "preprocessor_config.json")
        if images is not None and not is_object(images):
            raise ConfigError("processor_config.json has an image_processor that is no object")
        image_config = ImageConfig.from_dict(images, config)
        return cls(
            config,
            image_config,
            Tokenizer.from_folder(folder),
            ChatTemplate.from_folder(folder),
            VideoConfig.from_folder(folder, settings, image_config, config),
        )

    def render(self, messages: Sequence[Message], order: Order = "template") -> str:
        """The prompt text of a conversation in its one form, the user's text verbatim, media as
        placeholders; they need no source.
        """
        return "".join(s.text for s in self.segments(messages, order))

    def segments(
        self, messages: Sequence[Message], order: Order = "template", answering: bool = True
    ) -> list[Segment]:
        """The prompt of a conversation in segments; see :meth:`ChatTemplate.segments`."""
        return self.template.segments(messages, self._specials, order, answering)

    def prepare(
        self,
        messages: Sequence[Message],
        *,
        tiling: Tiling = "auto",
        order: Order = "template",
        num_frames: int | None = None,
        fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
        ends: bool = False,
        visual_tokens: float | None = None,
        answer: int = 256,
        check: Callable[[], None] = lambda: None,
        segments: Sequence[Segment] | None = None,
    ) -> Inputs:
        """Ids and pixels of a conversation.

        messages : as :func:`~mlx_onevision.prompt.messages.normalise_messages` returns them.
        tiling : "auto" tiles an image that is alone in the conversation; "always" and "never" say
            so for every image.
        order : "template" leaves it to the chat template where in a message its media stand, which
            is in front; "given" keeps them where they stand between the text.
        num_frames, fps, start, end, ends : which frames of each video, see
            ``FrameOptions``; a video block may say otherwise of its own.
        visual_tokens : the share to keep of the tokens of an image's tiles and of video frames; see
            :func:`~mlx_onevision.media.anyres.thinned`.
        answer : tokens of the context to leave for the answer where the number of frames is open.
        check : called between images and frames; ends the work by raising.
        segments : the prompt, instead of the one that the template renders.

        Raises:
            RequestError: for a conversation that cannot be, or whose media the template leaves out.
            MediaError: for an image or a video that cannot be read.
            ContextOverflowError: for more frames than the context has room for.
        """
        if tiling not in ("auto", "always", "never"):
            raise RequestError(f"tiling is {tiling!r}; it must be auto, always or never")
        share = self.visual_tokens if visual_tokens is None else visual_tokens
        check_range("visual_tokens", share)
        given = {"num_frames": num_frames, "fps": fps, "start": start, "end": end}
        given |= {"ends": ends or None}
        options = self.video_config.frames.over({k: v for k, v in given.items() if v is not None})
        if segments is None:
            segments = self.segments(messages, order)
        videos = video_blocks(messages)
        _match(segments, "<image>", len(sources(messages, "image")))
        _match(segments, "<video>", len(videos))
        images = self._images(messages, tiling, share, check)
        texts = [[] if s.control else self.tokenizer.encode(s.text) for s in segments]
        media: dict[str, list[Medium]] = {"<image>": images, "<video>": []}
        if not videos:
            return self._assemble(segments, texts, media)
        taken = sum(map(len, texts)) + sum(s.control for s in segments) - len(videos)
        taken += sum(image.tokens - 1 for image in images)
        sentence = 0
        if self.config.add_time_instruction:
            sentence = len(self.tokenizer.encode(time_instruction((), 99999.0)))
        budget = ContextBudget(
            limit=self.context,
            taken=taken,
            answer=answer,
            packing=VideoPacking.of(self.config, share),
            sentence=sentence,
        )
        size = self.video_config.pixels.size
        load = partial(load_video, check=check, cache=self.cache, limits=self.decoding)
        frames = load_videos(videos, options, size, budget, load)
        media["<video>"] = [self._video(video, budget.packing) for video in frames]
        if sentence:
            segments = with_times(segments, frames)
            texts = [[] if s.control else self.tokenizer.encode(s.text) for s in segments]
        return self._assemble(segments, texts, media)

    def _images(
        self,
        messages: Sequence[Message],
        tiling: Tiling,
        share: float,
        check: Callable[[], None],
    ) -> list[Medium]:
        given = sources(messages, "image")
        alone = len(given) == 1
        aspect = self.config.vision_aspect_ratio
        if tiling == "always" and not self.config.is_tiled:
            raise RequestError(
                f"this model sees an image as one tile (image_aspect_ratio {aspect!r}); leave "
                "tiling at auto"
            )
        shape: Shape = "square" if alone and aspect == "square" else "pad"
        if tiling == "always" or (tiling == "auto" and alone and self.config.is_tiled):
            shape = "grid"

        def checked() -> Iterator[Any]:
            for source in given:
                check()
                yield source

        return parallel_map(lambda source: self._image(source, shape, share), checked())

    def _image(self, source: Any, shape: Shape, share: float) -> Medium:
        key, read = identify_image(source)
        key = None if key is None else (key, shape, share)
        medium = self.cache.get(key, Medium)
        if medium is None:
            with read() as pixels:
                medium = self._tiled(pixels, shape, share)
                del pixels
            self.cache.put(key, medium)
        return medium

    def _tiled(self, pixels: NDArray[np.uint8], shape: Shape, share: float) -> Medium:
        size = (pixels.shape[0], pixels.shape[1])
        patches = self.config.vision_config.patches_per_side
        merge = self.config.mm_patch_merge_type
        if shape != "grid":
            one = squeeze_to_tile if shape == "square" else pad_to_square_tile
            tile = one(pixels, self.image_config)
            tokens = single_tile_tokens(patches, merge)
            return Medium("image", tile, size, None, tokens, self.image_config)
        packing = plan_packing(
            size,
            self.image_config.image_grid_pinpoints,
            self.image_config.size,
            patches,
            self.config.max_tiles,
            merge,
        )
        packing = thinned(packing, share)
        tiles = tile_image(pixels, self.image_config)
        return Medium("image", tiles, size, packing, packing.tokens, self.image_config)

    def _video(self, video: VideoFrames, packing: VideoPacking) -> Medium:
        tokens = packing.tokens(len(video.tiles))
        return Medium("video", video.tiles, None, packing, tokens, self.video_config.pixels, video)

    def _assemble(
        self,
        segments: Sequence[Segment],
        texts: Sequence[Sequence[int]],
        media: Mapping[str, Sequence[Medium]],
    ) -> Inputs:
        waiting = {token: iter(given) for token, given in media.items()}
        ids: list[int] = []
        learned: list[bool] = []
        placed: list[Medium] = []
        for segment, text in zip(segments, texts, strict=True):
            if not segment.control:
                ids += text
            elif segment.text in waiting:
                placed.append(next(waiting[segment.text]))
                ids += [self._specials[segment.text]] * placed[-1].tokens
            else:
                ids.append(self._specials[segment.text])
            learned += [segment.learned] * (len(ids) - len(learned))
        if not ids:
            raise RequestError("the chat template makes an empty prompt of this conversation")
        array = np.array(ids, np.int32)
        rows = self.config.text_config.vocab_size
        beyond = set(array[array >= rows].tolist()) - set(self._placeholders.values())
        if beyond:
            raise RequestError(
                f"the prompt has the token {self.tokenizer.id_to_token(min(beyond))!r} with the id "
                f"{min(beyond)}, but the model's vocab_size is {rows}; leave it out"
            )
        prompt = "".join(segment.text for segment in segments)
        return Inputs(array, tuple(placed), prompt, np.array(learned, np.bool_))


def _match(segments: Sequence[Segment], token: str, given: int) -> None:
    written = sum(segment.control and segment.text == token for segment in segments)
    if written != given:
        raise RequestError(f"the chat template writes {written} {token} for {given} of them")


def _check(settings: Mapping[str, Any], config: OneVisionConfig) -> None:
    """processor_config.json against config.json, since counts and features must agree."""
    expected = {
        "num_image_tokens": config.tokens_per_tile,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": config.vision_aspect_ratio,
        "image_token": "<image>",
        "video_token": "<video>",
    }
    for name, value in expected.items():
        found = settings.get(name)
        if found is not None and found != value:
            raise ConfigError(
                f"processor_config.json has {name} {shown(found)}; it must be {value!r}"
            )
