"""Settings of a task's generation as the reference heeds them."""

from collections.abc import Mapping
from typing import Any

from mlx_onevision.engine.options import Options
from mlx_onevision.errors import RequestError

MAX_NEW_TOKENS = 1024  # where a task says nothing

SAMPLING = ("temperature", "top_p", "top_k")
HEEDED = {"max_new_tokens", "do_sample", "num_beams", "repetition_penalty", "until", *SAMPLING}
# Taken and dropped, there as here.
DROPPED = {"image_aspect_ratio", "modalities"}


def options(given: Mapping[str, Any], *, until: bool) -> Options:
    """What ``generation_kwargs`` of a task mean here.

    until : whether its stop strings count. The reference drops them, and so the published tables
        are without them.

    Raises:
        RequestError: for beams, of which there is one.
    """
    beams = given.get("num_beams") or 1
    if int(beams) != 1:
        raise RequestError(
            f"the task wants num_beams={beams}, which is not supported; --gen_kwargs num_beams=1"
        )
    made = Options(max_tokens=int(given.get("max_new_tokens") or MAX_NEW_TOKENS))
    # Greedy unless a task says otherwise, whatever else it says.
    made["temperature"] = 0.0
    if given.get("do_sample"):
        sampling = {name: given[name] for name in SAMPLING if given.get(name) is not None}
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
    return sorted(set(given) - HEEDED - DROPPED)
