"""One memory budget for a request's intermediate values, and the sizes that follow from it.

Weights, KV caches and features have the sizes they have; what can be chosen is how much is computed
at once: tiles a group in the tower, tokens a chunk in prefill, and layers between two evaluations.
Arithmetic only, so that it can be tested for other devices.
"""

from dataclasses import dataclass

from mlx_onevision.config.model import OneVisionConfig, TextConfig

MEGABYTE = 1 << 20
CHUNKS = (8192, 4096, 2048, 1024, 512, 256)
INTERVALS = (4, 2, 1)
TILE_GROUPS = (10, 5, 2, 1)  # ten fill a large device; more only take memory

# Requests of a batch that decode together, and that are in prefill together. More would hardly be
# faster on the devices that this runs on, and every request waits for the longest.
MAX_BATCH_SIZE = 32
MAX_PREFILL_BATCH_SIZE = 8

# Live values at the peak of a layer, measured against the plain count of its activations.
OVERHEAD = 1.6


@dataclass(frozen=True)
class Budget:
    """How much is computed at once.

    tile_group : tiles that go through the tower together.
    chunk : prompt tokens that go through the language model together.
    tower_interval, interval : layers whose values are held at once, there and here.
    """

    tile_group: int
    tower_interval: int
    chunk: int
    interval: int


def scratch_bytes(working_set: int, weights: int) -> int:
    """What a request's intermediate values may take: an eighth of what the weights leave free of
    the memory that the device should use, within 192 MB and 3 GB.
    """
    return max(192 * MEGABYTE, min((working_set - weights) // 8, 3072 * MEGABYTE))


def plan(config: OneVisionConfig, scratch: int, itemsize: int) -> Budget:
    """The largest steps whose intermediate values stay within ``scratch`` bytes.

    itemsize : bytes a value, of the type that the model computes in.
    """
    vision, text = config.vision_config, config.text_config
    tile = (
        config.tokens_per_tile
        * (6 * vision.hidden_size + 2 * vision.intermediate_size)
        * itemsize
        * OVERHEAD
    )
    heads = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    token = (3 * text.hidden_size + 3 * text.intermediate_size + heads) * itemsize * OVERHEAD
    tile_group = next((n for n in TILE_GROUPS if n * tile <= scratch), TILE_GROUPS[-1])
    chunk = next((n for n in CHUNKS if n * token <= scratch), CHUNKS[-1])
    return Budget(
        tile_group=tile_group,
        tower_interval=_interval(scratch, tile_group * tile),
        chunk=chunk,
        interval=_interval(scratch, chunk * token),
    )


def batch_positions(text: TextConfig, free: int, itemsize: int) -> int:
    """Positions whose keys and values may be held for a batch.

    free : bytes that nothing else is planned for. Half of it, because the keys and values are
        copied whenever requests join or leave.
    """
    position = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * itemsize
    return max(free, 0) // 2 // position


def prefill_batch(chunk: int, requests: int) -> tuple[int, int]:
    """How many of a batch's requests are in prefill together, and how many tokens each at once:
    together no more than the ``chunk`` of a lone prompt, and no less than the smallest one each.
    """
    together = max(1, min(requests, MAX_PREFILL_BATCH_SIZE, chunk // CHUNKS[-1]))
    return together, chunk // together


def _interval(scratch: int, layer: float) -> int:
    return next((n for n in INTERVALS if n * layer <= scratch), INTERVALS[-1])
