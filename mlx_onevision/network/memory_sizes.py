"""What a model and a request take of memory: arithmetic only, so that it can be tested for other
machines.

At its peak a request holds the weights, the keys and values of its prompt and answer, the features
of its media, and the intermediate values of one step. The request fixes the first three sizes. The
intermediate values depend on how much is computed at once, and that is chosen here: tiles a group
in the tower, tokens a chunk in prefill, and layers between two evaluations.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.errors import RequestError
from mlx_onevision.media.anyres import Packing

CHUNKS = (8192, 4096, 2048, 1024, 512, 256)
INTERVALS = (4, 2, 1)
TILE_GROUPS = (10, 5, 2, 1)  # ten fill a large device; more only take memory
CACHE_STEP = 256  # positions that a KV cache grows by at a time
FOLLOW_UP = 256  # positions kept free for a next turn, so that the KV cache is not copied first
DENSE_ROWS = 64  # fewest rows for which LongStepLinear may dequantize a matrix
NEVER = float("inf")
KV_BITS = (8, 4)
KV_GROUPS = (64, 32)  # values that share a scale and a bias in a quantized KV cache


@dataclass(frozen=True)
class Budget:
    """How much is computed at once.

    tile_group : tiles that go through the tower together.
    chunk : prompt tokens that go through the language model together.
    tower_interval, interval : layers of the tower and of the language model whose values are held
        at once.
    dense_rows : as in :class:`ModelSizes`.
    """

    tile_group: int
    tower_interval: int
    chunk: int
    interval: int
    dense_rows: float = NEVER

    def interval_for(self, tokens: int) -> int:
        """Layers between two evaluations in a step of so many tokens: more for short steps, as long
        as they hold no more at once than a whole chunk, and no matrices are dequantized.
        """
        if tokens > CHUNKS[-1] or tokens >= self.dense_rows:
            return self.interval
        return self.interval * max(1, self.chunk // tokens)


SMALLEST = Budget(TILE_GROUPS[-1], INTERVALS[-1], CHUNKS[-1], INTERVALS[-1])


class Backend(NamedTuple):
    """What a layer of a backend holds until it has been evaluated: the outputs of its operations,
    in multiples of its hidden states, queries, keys (as wide as values) and the MLP's inner values;
    for the tower, whose attention is as wide as its hidden states, of these and its inner values.

    fused : head widths for which a fused kernel computes attention without holding scores.
    window : the most layers that are computed at once; 0: all between two evaluations.
    dequantized : bytes for each value of a matrix while it is dequantized, in models of 2 and of 4
        bytes a value.
    """

    hidden: float
    queries: float
    keys: float
    inner: float
    tower_hidden: float
    tower_inner: float
    fused: tuple[int, ...]
    window: int
    dequantized: tuple[int, int]


# Metal and CUDA have kernels for rotations, norms and dequantizing, which on a CPU are several
# operations each.
BACKENDS = {
    "cpu": Backend(5, 10, 4, 3, 18, 2, (), 1, (10, 8)),
    "metal": Backend(4, 4, 3, 3, 10, 2, (64, 80, 128), 0, (2, 4)),
    "cuda": Backend(4, 4, 3, 3, 10, 2, tuple(range(8, 129, 8)), 0, (2, 4)),
}


class MediumSize(NamedTuple):
    """An image or a video: its tiles (or frames), and its tokens in the prompt.

    packing : of a tiled image. key : media of the same key are held once.
    """

    tiles: int
    tokens: int
    packing: Packing | None = None
    video: bool = False
    key: str = ""


class RequestSize(NamedTuple):
    """A request: the tokens of its prompt and of its longest answer, and its media.

    drafted : whether a draft model proposes the answer's tokens while the request runs alone.
    """

    prompt: int
    answer: int
    media: tuple[MediumSize, ...] = ()
    drafted: bool = False


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak of answering.

    tokens : of prompt and answer.
    weights : of the model. cache : of the keys and values.
    features : of the media's embeddings.
    scratch : of the intermediate values in the step that takes the most.
    """

    tokens: int
    weights: int
    cache: int
    features: int
    scratch: int

    @property
    def beyond_weights(self) -> int:
        return self.cache + self.features + self.scratch

    @property
    def total(self) -> int:
        return self.weights + self.beyond_weights

    def to_dict(self) -> dict[str, int]:
        parts = ("weights", "cache", "features", "scratch", "total")
        return {"tokens": self.tokens} | {f"{part}_bytes": getattr(self, part) for part in parts}


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model; every method returns bytes.

    weights : bytes of all weights, a draft model's included.
    itemsize : bytes a value, of the type that the model computes in.
    backend : a name of ``BACKENDS``.
    kv_bits : bits a value of a quantized KV cache; None for one that is not.
    most_chunk : the most prompt tokens of a lone request that are computed at once, whatever the
        budget.
    dense_rows : the rows from which on the language model's quantized matrices are dequantized.
    dense_tower : whether those of tower and projector are; their steps never have few rows.
    joined : bytes of the largest matrix that is joined from others at its first use.
    draft : the sizes of a draft model.
    has_tower : whether it encodes media; where ranks divide the layers, only one does.
    """

    config: OneVisionConfig
    weights: int
    itemsize: int = 2
    backend: str = "metal"
    kv_bits: int | None = None
    most_chunk: int = CHUNKS[0]
    dense_rows: float = NEVER
    dense_tower: bool = False
    joined: int = 0
    draft: "ModelSizes | None" = None
    has_tower: bool = True

    @property
    def position(self) -> int:
        """Bytes of the keys and values of one position."""
        text = self.config.text_config
        values = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        if self.kv_bits is None:
            return values * self.itemsize
        return values * self.kv_bits // 8 + values // self.kv_group * 2 * self.itemsize

    @property
    def kv_group(self) -> int:
        """Values of a group in a quantized KV cache. Raises RequestError for other ``kv_bits`` than
        ``KV_BITS``, and where the width of the heads is no multiple of a group.
        """
        head_dim = self.config.text_config.head_dim
        if self.kv_bits not in KV_BITS:
            raise RequestError(f"kv_bits is {self.kv_bits!r}; keys and values take 8 or 4 bits")
        found = next((group for group in KV_GROUPS if head_dim % group == 0), None)
        if found is None:
            raise RequestError(
                f"the model's heads are {head_dim} wide, so their keys cannot be quantized; "
                "leave kv_bits out"
            )
        return found

    def cache(self, positions: int) -> int:
        """A KV cache that holds so many positions."""
        return _rounded(positions) * self.position

    def features(self, tokens: int) -> int:
        """So many embeddings."""
        return tokens * self.config.text_config.hidden_size * self.itemsize

    # Steps: what one evaluation holds at its peak.

    def layer(self, tokens: int, past: int = 0, rows: int = 1) -> int:
        """A layer of the language model, in a step of ``tokens`` tokens of each of ``rows``
        requests, behind ``past`` positions.
        """
        text, backend = self.config.text_config, BACKENDS[self.backend]
        keys = text.num_key_value_heads * text.head_dim
        queries = text.num_attention_heads * text.head_dim
        values = tokens * (
            backend.hidden * text.hidden_size
            + backend.queries * queries
            + backend.keys * keys
            + backend.inner * text.intermediate_size
        )
        if text.head_dim not in backend.fused:
            values += text.num_attention_heads * tokens * (past + tokens)
        if self.kv_bits is not None:  # dequantized for attention
            values += 2 * keys * (_rounded(past + tokens) + tokens)
        return int(rows * values * self.itemsize)

    def dequantized(self, values: int) -> int:
        """Quantized matrices of so many values, while they are dequantized."""
        return values * BACKENDS[self.backend].dequantized[self.itemsize == 4]

    def prefill(self, tokens: int, budget: Budget, rows: int = 1) -> int:
        """Prompts of so many tokens, one a row: the last of their chunks, with its embeddings."""
        if not tokens:
            return 0
        text, backend = self.config.text_config, BACKENDS[self.backend]
        chunk = min(tokens, budget.chunk)
        layers = min(budget.interval_for(rows * chunk), text.num_hidden_layers)
        step = min(layers, backend.window or layers) * self.layer(chunk, tokens - chunk, rows)
        if rows * chunk >= self.dense_rows:  # an MLP's matrices; the attention's are freed by then
            dense = self.dequantized(3 * text.intermediate_size * text.hidden_size)
            if backend.window:  # as are the attention's values
                inner = rows * chunk * self.itemsize
                inner *= int(backend.inner * text.intermediate_size) + 3 * text.hidden_size
                step = max(step - inner, inner + dense)
            else:
                step += dense
        return 2 * rows * self.features(chunk) + step

    def decode(self, rows: int = 1) -> int:
        """The logits of two decode steps, each twice in float32 and once as computed."""
        return 2 * rows * self.config.text_config.vocab_size * (2 * 4 + self.itemsize)

    def tower(self, tiles: int, budget: Budget, video: bool = False) -> int:
        """A group of tiles, from pixels to the projector's output, that of a video pooled."""
        vision, backend = self.config.vision_config, BACKENDS[self.backend]
        patches, width = tiles * self.config.tokens_per_tile, vision.hidden_size
        pixels = tiles * vision.image_size**2 * vision.num_channels * 4
        layer = patches * (
            backend.tower_hidden * width + backend.tower_inner * vision.intermediate_size
        )
        if width // vision.num_attention_heads not in backend.fused:
            layer += patches * self.config.tokens_per_tile * vision.num_attention_heads
        layers = min(budget.tower_interval, vision.num_hidden_layers)
        layers = min(layers, BACKENDS[self.backend].window or layers)
        D = self.config.text_config.hidden_size
        entering = width * len(self.config.feature_layers)
        projected = patches * (entering + 2 * D) * self.itemsize
        step = int(layers * layer * self.itemsize)
        if self.dense_tower:
            step += self.dequantized(2 * vision.intermediate_size * width)
            projected += self.dequantized(D * (entering + D))
        if video:
            side = vision.patches_per_side
            pooled = (side + 1) // 2
            # Two neighbours along each axis, also in float32.
            projected += tiles * pooled * (side + pooled) * D * 2 * (4 + self.itemsize)
        return pixels + max(step, projected)

    def packed(self, medium: MediumSize) -> int:
        """Packing a tiled image: what is held beside its features, and the result."""
        packing = medium.packing
        if packing is None:
            return 0
        D = self.config.text_config.hidden_size
        grid = (packing.tiles - 1) * packing.patches**2 * D * self.itemsize
        placed = self.features(medium.tokens)
        if packing.interpolated:
            (rows, cols), (top, bottom, _, _) = packing.shape, packing.box
            # Two neighbours along each axis, also in float32, and the result.
            wide = (bottom - top) * cols * D
            grid += wide * 2 * (4 + self.itemsize) + rows * cols * D * (2 * 4 + self.itemsize)
        return grid + placed

    def encode(self, media: Sequence[MediumSize], budget: Budget) -> int:
        """Images and videos, from tiles to features, these included. A group of tiles is filled
        from one medium after another.
        """
        if not self.has_tower:
            return 0
        group = min(sum(medium.tiles for medium in media), budget.tile_group)
        peak, done = 0, 0
        for medium in media:
            n = self.config.tokens_per_tile
            if medium.video:
                n = medium.tokens // medium.tiles
            encoded = self.features(medium.tiles * n)
            step = encoded + self.tower(group, budget, medium.video)
            own = self.features(medium.tokens)
            peak = max(peak, done + max(step, 2 * encoded + self.packed(medium) + own))
            done += own
        return peak

    # Requests.

    def request(self, size: RequestSize, budget: Budget, every: bool = False) -> Footprint:
        """A request that runs alone. every : whether the logits of every position are returned."""
        budget = replace(budget, chunk=min(budget.chunk, self.most_chunk))
        if every:  # a chunk's are computed and converted, and then kept beside the others
            values = size.prompt * 4 + min(budget.chunk, size.prompt) * (4 + self.itemsize)
            prefill = self.request(size, budget)
            logits = values * self.config.text_config.vocab_size
            return replace(prefill, scratch=prefill.scratch + logits)
        answer = max(size.answer, min(size.answer, CACHE_STEP) + FOLLOW_UP)
        cache = self.cache(size.prompt + answer)
        features = sum(self.features(m.tokens) for m in size.media) if self.has_tower else 0
        # A layer's keys and values are copied where the cache grows.
        copied = cache // self.config.text_config.num_hidden_layers
        step = max(self.prefill(size.prompt, budget), self.decode() + copied)
        scratch = max(step, self.joined, self.encode(size.media, budget) - features - cache)
        if size.drafted and self.draft is not None:  # it begins after the first token
            own = self.draft.request(size, budget)
            cache += own.cache
            scratch = max(scratch, own.scratch)
            features = max(features, own.features)
        return Footprint(size.prompt + size.answer, self.weights, cache, features, scratch)

    def batch(self, sizes: Sequence[RequestSize], budget: Budget) -> Footprint:
        """Requests that run together: keys and values are padded to the longest request, and
        copied, a layer at a time, when requests join or leave.
        """
        if len(sizes) == 1:
            return self.request(sizes[0], budget)
        longest = max(size.prompt + size.answer for size in sizes)
        every = [medium for size in sizes for medium in size.media]
        media = list({medium.key or n: medium for n, medium in enumerate(every)}.values())
        features = sum(self.features(m.tokens) for m in media) if self.has_tower else 0
        cache = len(sizes) * self.cache(longest)
        budget = replace(budget, chunk=min(budget.chunk, self.most_chunk))
        step = self.prefill(max(size.prompt for size in sizes), budget)
        copied = 2 * cache // self.config.text_config.num_hidden_layers
        encoding = self.encode(media, budget) - features
        scratch = max(step, encoding, copied, self.joined, self.decode(len(sizes)))
        return Footprint(len(sizes) * longest, self.weights, cache, features, scratch)


def _rounded(positions: int) -> int:
    return -(-positions // CACHE_STEP) * CACHE_STEP
