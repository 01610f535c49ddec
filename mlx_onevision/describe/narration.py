"""What a model is asked when it describes a film: the questions of a segment, a chapter, the whole.

The demo model is trained on these very words, so a change here wants it trained again. Numbers and
times are left out on purpose: a model that reads none repeats none.
"""

from collections.abc import Sequence

SEGMENT = "Describe what happens in this video in one or two sentences."


def summary_question(captions: Sequence[str]) -> str:
    """Asks for a summary of the captions of a film's segments, in order."""
    return _told("These are the scenes of a video, in order:", captions) + (
        "Summarise the video in one to three sentences."
    )


def title_question(captions: Sequence[str]) -> str:
    """Asks for the title of a chapter, of which these are the captions, in order."""
    return _told("This happens in a part of a video:", captions) + (
        "Give this part of the video a title of two to six words."
    )


def _told(opening: str, captions: Sequence[str]) -> str:
    """A caption a line; line breaks within one are not kept."""
    lines = (f"- {' '.join(caption.split())}" for caption in captions)
    return "\n".join([opening, *lines]) + "\n\n"
