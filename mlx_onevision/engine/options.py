"""The settings of a request, by the names that callers use."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict, cast

from mlx_onevision.errors import RequestError


class Options(TypedDict, total=False):
    """Settings of an answer; each has a default.

    system : instructions that stand before the conversation.
    max_tokens : the answer's length at most; None takes the checkpoint's max_new_tokens, else 256.
        The context may end it earlier.
    temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty,
        logit_bias, seed : see :class:`~mlx_onevision.sampling.sampler.Sampling`. None takes what
        the checkpoint's generation_config.json says, which for the published ones is greedy.
    stop : a text, or texts, at which the answer ends; they are not part of it.
    num_frames, fps, start, end : which frames of each video, see ``FrameOptions``. Of a file it is
        32, evenly spread, unless they say otherwise, or fewer where the context holds fewer.
    tiling : "auto" cuts an image into tiles when it is alone in the conversation, "always" and
        "never" say so for every image.
    visual_tokens : the share to keep of the tokens of an image's tiles and of video frames, above 0
        and at most 1; see :func:`~mlx_onevision.media.anyres.thinned`. None takes what ``load`` was
        given, else 1.
    logprobs : how many of the likeliest tokens are reported for each token of the answer, 0 for the
        chosen one alone; None reports none. See :mod:`~mlx_onevision.sampling.logprobs`.
    json_schema : a JSON Schema, as JSON or as what that would be in Python: the answer is a
        document that it allows and nothing else, unless max_tokens or a stop string cuts it off.
        Needs the extra ``structured``.
    prompt_lookup : speculative decoding of greedy answers: so many tokens that followed the last
        ones before, in prompt or answer, are tried in one step. The answer is the same, up to the
        rounding of half precision, and comes faster where it repeats a passage; 0, the default, for
        none. A request that shares its steps with others has none.
    draft_tokens : the same with a smaller model, which :func:`~mlx_onevision.api.load` took as
        ``draft_model``: so many tokens that it would say are tried in one step, fewer or none while
        few of them are right. It sees the images and videos, too.
    check : called while images and videos are read, between any two of them and between frames,
        before there is a stream that could be cancelled: what it raises ends the request there.
    order : "template" lets the chat template move media to the front of their message, as the
        reference does; "given" keeps them where they stand between the words.
    """

    system: str | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    num_frames: int | None
    fps: float | None
    start: float | None
    end: float | None
    tiling: Literal["auto", "always", "never"]
    order: Literal["template", "given"]
    visual_tokens: float | None
    logprobs: int | None
    json_schema: str | bool | Mapping[str, Any] | None
    prompt_lookup: int
    draft_tokens: int
    check: Callable[[], None]


MEDIA = ("images", "videos", "messages")


def check_names(given: Iterable[str]) -> None:
    """RequestError for a name that is none of an answer's arguments, with the nearest that is."""
    known = [*Options.__annotations__, *MEDIA]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            way = f"it may be {near[0]}" if near else "see mlx_onevision.Options"
            raise RequestError(f"generate and stream have no argument {name!r}; {way}")


def batch_requests(batch: Any, options: Any) -> Iterator[tuple[dict[str, Any], Options]]:
    """Each request of a batch as ``prompt`` or ``messages``, with the settings that are its own.

    batch : a sequence of texts and conversations. options : None, or a sequence of
        :class:`Options`, one for each. Both come from callers, whose types nobody has checked.

    Raises:
        RequestError: for a batch or options that are no lists of one length; an unknown setting.
    """
    items = _sequence(batch, f"the batch is a {type(batch).__name__}; it must be a list")
    if items and all(isinstance(item, Mapping) for item in items):
        raise RequestError("the batch is one conversation; give a list of conversations")
    refusal = "options must be a list, with the settings of each request of the batch"
    settings = [Options()] * len(items) if options is None else _sequence(options, refusal)
    if len(settings) != len(items):
        raise RequestError(f"the batch has {len(items)} requests, but {len(settings)} have options")
    for number, own in enumerate(settings, 1):
        if not isinstance(own, Mapping):
            raise RequestError(f"the options of request {number} are a {type(own).__name__}")
        names = cast(Mapping[Any, Any], own).keys()
        unknown = sorted(map(str, names - Options.__annotations__.keys()))
        if unknown:
            raise RequestError(f"the options of request {number} have {unknown[0]!r}; see Options")
    return (
        ({"prompt": item} if isinstance(item, str) else {"messages": item}, own)
        for item, own in zip(items, settings, strict=True)
    )


def _sequence(given: Any, refusal: str) -> Sequence[Any]:
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise RequestError(refusal)
    return cast(Sequence[Any], given)
