"""The models that embed, two for each that answers: a model of ``llm`` has one space."""

from collections.abc import Iterable, Iterator
from itertools import islice

from llm.models import EmbeddingModel

from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.media import Media
from mlx_onevision.plugins.contract.requests import EmbeddingSpace, EmbedRequest
from mlx_onevision.plugins.hosts.llm.attachments import kind
from mlx_onevision.plugins.hosts.llm.opened import opened
from mlx_onevision.plugins.hosts.llm.refusals import Refusal, told
from mlx_onevision.plugins.hosts.llm.registry import Entry

SPACES: tuple[EmbeddingSpace, ...] = ("vision", "joint")
BATCH = 32  # items that are held at once


class OneVisionEmbedding(EmbeddingModel):
    """``vision`` is for pictures and videos that look alike; ``joint`` holds texts, too."""

    supports_binary = True
    batch_size = BATCH

    def __init__(self, entry: Entry, space: EmbeddingSpace) -> None:
        self.model_id = f"{entry.id}-{space}"
        self.supports_text = space == "joint"
        self._entry = entry
        self._space: EmbeddingSpace = space

    def _check(self, item: str | bytes) -> None:
        # In llm a ValueError, which `llm embed` shows as a traceback.
        if isinstance(item, str) and not self.supports_text:
            other = self.model_id.removesuffix("vision") + "joint"
            raise Refusal(
                f"{self.model_id} has no place for texts; give it pictures with --binary, or take "
                f"{other}"
            )

    def embed_batch(
        self, items: Iterable[str | bytes], *, key: str | None = None
    ) -> Iterator[list[float]]:
        rest = iter(items)
        while group := list(islice(rest, BATCH)):
            with told():
                vectors = self._vectors(group)
            yield from vectors

    def _vectors(self, group: list[str | bytes]) -> list[list[float]]:
        alone = len(group) == 1
        wanted = [
            item
            if isinstance(item, str)
            else Media(kind(item, "the input" if alone else f"item {place}"), data=item)
            for place, item in enumerate(group, 1)
        ]
        try:
            found = opened(self._entry).embed(EmbedRequest(wanted, space=self._space))
        except PluginError as error:
            # Of a single item it need not be said which one it is.
            plain = error.message.removeprefix("item 1: ") if alone else error.message
            raise PluginError(error.code, plain, error.hint) from None
        return [list(vector) for vector in found.vectors]
