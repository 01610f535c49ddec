"""Questions of lmms-eval as conversations, such that their prompts are the reference's.

The reference is lmms-eval's own ``llava_onevision`` with the conversation template ``qwen_1_5`` of
LLaVA-NeXT: a system message, ``<image>`` for each image and one for a video, with blanks between
them and a newline behind, in front of a question that has none of its own. The chat templates of
the published checkpoints write other prompts (no system message, no newline after a turn), so this
brings its own.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal, TypeGuard

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.engine.options import Options
from mlx_onevision.errors import RequestError
from mlx_onevision.media.frame_sampling import end_to_end
from mlx_onevision.plugins.contract.wire import is_list, is_object
from mlx_onevision.prompt.processor import Medium

MAX_NEW_TOKENS = 1024  # where a task has no limit

SAMPLING_OPTIONS = ("temperature", "top_p", "top_k")
SUPPORTED_OPTIONS = {
    "max_new_tokens",
    "do_sample",
    "num_beams",
    "repetition_penalty",
    "until",
    *SAMPLING_OPTIONS,
}
# Taken and dropped, there as here.
IGNORED_OPTIONS = {"image_aspect_ratio", "modalities"}


def options(given: Mapping[str, Any], *, until: bool) -> Options:
    """What ``generation_kwargs`` of a task mean here.

    until : whether its stop strings count. The reference drops them, and so the published tables
        are without them.

    Raises RequestError: for beams, of which there is one.
    """
    beams = given.get("num_beams") or 1
    if int(beams) != 1:
        message = f"the task wants num_beams={beams}, which is not supported"
        raise RequestError(f"{message}; --gen_kwargs num_beams=1")
    made = Options(max_tokens=int(given.get("max_new_tokens") or MAX_NEW_TOKENS))
    # Greedy unless a task asks for sampling, whatever its other options.
    made["temperature"] = 0.0
    if given.get("do_sample"):
        sampling = {name: given[name] for name in SAMPLING_OPTIONS if given.get(name) is not None}
        made["temperature"] = sampling.get("temperature")
        if sampling.get("top_p"):
            made["top_p"] = float(sampling["top_p"])
        if "top_k" in sampling:
            made["top_k"] = int(sampling["top_k"])
    if given.get("repetition_penalty") is not None:
        made["repetition_penalty"] = float(given["repetition_penalty"])
    if until:
        stop = given.get("until") or ()
        made["stop"] = (stop,) if isinstance(stop, str) else tuple(filter(None, stop))
    return made


def unknown(given: Mapping[str, Any]) -> list[str]:
    """Settings that change nothing here."""
    return sorted(set(given) - SUPPORTED_OPTIONS - IGNORED_OPTIONS)


IMAGE_PLACEHOLDER = "<image>"
DEFAULT_FRAMES = 32
PADDING_COLOUR = (127, 127, 127)  # the mean of SigLIP's pixels, rounded down as there

# Media stand where they stand; a conversation that ends with an answer asks for none.
CHAT_TEMPLATE = """\
{% if messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}\
{% endif %}
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' }}\
{% for block in message['content'] %}
{{ block['text'] if block['type'] == 'text' else '<' + block['type'] + '>' }}\
{% endfor %}
{{ '<|im_end|>\\n' }}\
{% endfor %}
{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}
{{ '<|im_start|>assistant\\n' }}\
{% endif %}
"""

Message = dict[str, Any]
Block = dict[str, Any]


@dataclass(frozen=True)
class Visuals:
    """What a question is about.

    tiling : of images. One that is alone is cut into tiles; of several none is.
    """

    blocks: tuple[Block, ...] = ()
    tiling: Literal["always", "never"] = "never"

    @property
    def placeholders(self) -> str:
        return " ".join([IMAGE_PLACEHOLDER] * len(self.blocks))

    def read(self, media: Sequence[Medium]) -> "Visuals":
        """The same, with the frames of a video, which need not be decoded again.

        media : as they were prepared.
        """
        if not self.blocks or self.blocks[0]["type"] != "video":
            return self
        return Visuals(({"type": "video", "video": media[0].tiles},), self.tiling)

    def in_front_of(self, context: str) -> str:
        """A question with the marks of what it is about, unless it has some."""
        if not self.blocks or IMAGE_PLACEHOLDER in context:
            return context
        return f"{self.placeholders}\n{context}"


def shown(visuals: Any, metadata: Mapping[str, Any], frames: int = DEFAULT_FRAMES) -> Visuals:
    """What ``doc_to_visual`` of a task returned.

    visuals : images; or the path of a video, and whatever comes after it is not heeded; or
        nothing.
    metadata : of the task. ``task_type: video`` with ``sample_frames`` makes a video of images.
    frames : so many of a video, from its first to its last.

    Raises RequestError: for anything else, such as sound.
    """
    if not visuals:
        return Visuals()
    if not _is_sequence(visuals):
        raise RequestError(f"doc_to_visual returned a {type(visuals).__name__}; it must be a list")
    if metadata.get("task_type") == "video" and "sample_frames" in metadata:
        taken = end_to_end(len(visuals), int(metadata["sample_frames"]))
        # The reference pads images of several to squares with grey, and resizes frames of a video
        # file without keeping the aspect ratio.
        chosen = [_squared(visuals[index]) for index in taken]
        return Visuals(({"type": "video", "video": chosen},))
    if isinstance(visuals[0], str | PathLike):
        video: Block = {"type": "video", "video": visuals[0], "num_frames": frames, "ends": True}
        return Visuals((video,))
    for visual in visuals:
        if not _is_image(visual):
            raise RequestError(f"a {type(visual).__name__} is neither an image nor a path")
    blocks = tuple({"type": "image", "image": visual} for visual in visuals)
    return Visuals(blocks, "always" if len(blocks) == 1 else "never")


def conversation(context: str, about: Visuals) -> list[Message]:
    """The turns of a question.

    context : the question; or, as JSON, a list of ``{"value": …}`` of the person and the model in
        turn. ``<image>`` in it stands for what it is about, in order.
    """
    media = _in_order(about.blocks)
    roles = ("user", "assistant")
    return [
        {"role": roles[place % 2], "content": list(_blocks(text, media, bool(about.blocks)))}
        for place, text in enumerate(_turns(about.in_front_of(context)))
    ]


def answered(context: str, about: Visuals, answer: str) -> list[Message]:
    """The same with an answer to the question."""
    reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return [*conversation(context, about), reply]


def _turns(question: str) -> list[str]:
    try:
        turns = json.loads(question)
    except ValueError:
        return [question]
    # A number is JSON, too, and so is a quoted word.
    if not is_list(turns) or not turns:
        return [question]
    if not all(is_object(turn) and "value" in turn for turn in turns):
        return [question]
    if len(turns) % 2 == 0:
        raise RequestError(f"a conversation of {len(turns)} turns does not end with a question")
    return [str(turn["value"]) for turn in turns]


def _in_order(blocks: Sequence[Block]) -> Iterator[Block]:
    """One after another; the last one again where more are asked for, as in LLaVA-NeXT."""
    yield from blocks
    while blocks:
        yield blocks[-1]


def _blocks(text: str, media: Iterator[Block], has_media: bool) -> Iterator[Block]:
    """A text in pieces, with media in the place of their marks; without media a mark is text."""
    for place, piece in enumerate(text.split(IMAGE_PLACEHOLDER) if has_media else [text]):
        if place:
            yield next(media)
        if piece:
            yield {"type": "text", "text": piece}


def _is_sequence(visuals: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(visuals, Sequence) and not isinstance(visuals, str | bytes)


def _is_image(visual: Any) -> bool:
    from PIL.Image import Image

    return isinstance(visual, Image)


def _squared(image: Any) -> Any:
    from PIL import Image

    if not _is_image(image):
        raise RequestError(f"a {type(image).__name__} is no frame of a video")
    side = max(image.size)
    square = Image.new("RGB", (side, side), PADDING_COLOUR)
    left, top = ((side - length) // 2 for length in image.size)
    square.paste(image.convert("RGB"), (left, top))
    return square


@dataclass(frozen=True)
class AnswerLoss:
    """loss : minus the mean logarithm of the probabilities of the answer's tokens, its end of turn
    included. greedy : whether each of the answer's own tokens is the likeliest in its place.
    """

    loss: float
    greedy: bool


def answer_loss(
    logits: NDArray[np.floating], following: NDArray[np.integer], own: int
) -> AnswerLoss:
    """How likely an answer was.

    logits : (n, vocabulary), of the positions before each of ``following``, (n,).
    own : so many of these are the answer's, the others end it.
    """
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=-1, keepdims=True)
    chosen = rows[np.arange(len(following)), following]
    losses = np.log(np.exp(rows).sum(axis=-1)) - chosen
    greedy = rows.argmax(axis=-1)[:own] == following[:own]
    return AnswerLoss(float(losses.mean()), bool(greedy.all()))
