"""What may be said with ``-o`` at the ``llm`` command, and by keyword in Python."""

from typing import Literal

import llm
from pydantic import Field


class OneVisionOptions(llm.Model.Options):
    """The names and meanings of ``GenerateRequest``; what is
    left out is the model's own.
    """

    max_tokens: int | None = Field(
        default=None, ge=1, description="The longest answer, in tokens; 256 by default"
    )
    temperature: float | None = Field(
        default=None, ge=0, description="0 always takes the likeliest token; more varies the answer"
    )
    top_p: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Choose among the likeliest tokens that make up this much probability",
    )
    top_k: int | None = Field(
        default=None, ge=0, description="Choose among so many of the likeliest tokens; 0 for all"
    )
    min_p: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Choose among tokens at least this likely, relative to the likeliest one",
    )
    repetition_penalty: float | None = Field(
        default=None, gt=0, description="Above 1 makes repeated tokens less likely"
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**64, description="Makes a varied answer repeatable"
    )
    stop: str | list[str] | None = Field(
        default=None, description="A text, or a list of texts, before which the answer ends"
    )
    num_frames: int | None = Field(
        default=None, ge=1, description="So many frames of each video, evenly spread; 32 by default"
    )
    fps: float | None = Field(
        default=None, gt=0, description="So many frames of each second of a video instead"
    )
    start: float | None = Field(
        default=None, ge=0, description="Only what comes after these seconds of a video"
    )
    end: float | None = Field(
        default=None, gt=0, description="Only what comes before these seconds of a video"
    )
    tiling: Literal["auto", "always", "never"] | None = Field(
        default=None,
        description=(
            "auto cuts a picture into tiles that is alone in the conversation; always and never "
            "say so for every one"
        ),
    )
    order: Literal["template", "given"] | None = Field(
        default=None,
        description=(
            "template shows pictures before the words of their message; given leaves them where "
            "they stand"
        ),
    )
