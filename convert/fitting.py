"""Which bits fit a Mac: the best recipe whose weights, with a prompt's keys and values, find room.

Arithmetic over a configuration alone, so that it answers before anything has been downloaded.
"""

from dataclasses import dataclass

from mlx_onevision.config import OneVisionConfig
from mlx_onevision.convert.footprint import Footprint, footprint
from mlx_onevision.convert.loss_table import gigabytes
from mlx_onevision.errors import RequestError

GROUP = 64
HALF = 16  # bits of what is not packed

# From the best to the worst: bits of the language model, and of the tower and the projector. The
# language model comes first because it loses the most; the order of 4/4 before 3/8 is measured.
RECIPES = (
    (16, 16),
    (16, 8),
    (8, 8),
    (6, 8),
    (5, 8),
    (4, 8),
    (4, 4),
    (3, 8),
    (3, 4),
    (2, 8),
    (2, 4),
)

# Metal's recommendedMaxWorkingSetSize, as people have printed it (MiB of GiB): 10,923 of 16 and
# 21,845 of 32 are two thirds; 49,152 of 64 and 73,728 of 96 are three quarters
# (github.com/ggml-org/llama.cpp issues 5206, 2011, 1870, 3213). Recent systems give more, 107.5 of
# 128 GiB for one (github.com/antirez/ds4 issue 890), but a model has to fit on the others, too.
LARGE = 36 << 30


@dataclass(frozen=True)
class Fit:
    """A recipe that fits. 16 bits mean: not packed.

    usable : bytes that the GPU should use, of the machine's memory.
    why : one sentence, without a full stop.
    """

    language_bits: int
    vision_bits: int
    usable: int
    footprint: Footprint
    why: str


def fit(config: OneVisionConfig, memory: int, *, tokens: int | None = None) -> Fit:
    """The best of :data:`RECIPES` with which a model answers on a Mac.

    memory : bytes of unified memory.
    tokens : of the prompt and its answer; None: one 10-tile image, some words, and an answer.

    Raises:
        RequestError: when none of them fits.
    """
    usable = usable_bytes(memory)
    previous = ""
    found = None
    for language, vision in RECIPES:
        found = footprint(
            config, weights_bytes(config, language, vision), tokens=tokens, working_set=usable
        )
        if found.total <= usable:
            why = (
                f"of {gigabytes(memory)} the GPU should use {gigabytes(usable)}, and "
                f"{_named(language, vision)} takes {gigabytes(found.total)}: "
                f"{gigabytes(found.weights)} of weights, "
                f"{gigabytes(found.cache + found.features)} for {found.tokens:,} tokens and "
                f"{gigabytes(found.scratch)} to compute in"
            )
            return Fit(language, vision, usable, found, why + previous)
        previous = f"; {_named(language, vision)} would take {gigabytes(found.total)}"
    assert found is not None
    raise RequestError(
        f"nothing fits: of {gigabytes(memory)} the GPU should use {gigabytes(usable)}, and even "
        f"{_named(*RECIPES[-1])} takes {gigabytes(found.total)} at {found.tokens:,} tokens; "
        "take a smaller model or a shorter prompt"
    )


def usable_bytes(memory: int) -> int:
    """What a GPU should use of so much unified memory: two thirds, or of a large one three
    quarters.
    """
    return memory * 3 // 4 if memory >= LARGE else memory * 2 // 3


def weights_bytes(config: OneVisionConfig, language_bits: int, vision_bits: int) -> int:
    """Bytes of all tensors: matrices packed affinely in groups of 64 with 16 bits for a scale and
    for a bias, everything else in 16 bits.
    """
    return sum(
        (rows * columns * bits + (rows * (-(-columns // GROUP)) * 32 if bits < HALF else 0)) // 8
        for bits, matrices in (
            (language_bits, _language_matrices(config)),
            (vision_bits, _vision_matrices(config, vision_bits < HALF)),
        )
        for rows, columns in matrices
    ) + 2 * _others(config, vision_bits < HALF)


def _language_matrices(config: OneVisionConfig) -> list[tuple[int, int]]:
    text = config.text_config
    width, inner = text.hidden_size, text.intermediate_size
    queries = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    layer = [(queries, width), (keys, width), (keys, width), (width, queries)]
    layer += [(inner, width), (inner, width), (width, inner)]
    tables = 1 if config.tie_word_embeddings else 2
    return layer * text.num_hidden_layers + [(text.vocab_size, width)] * tables


def _vision_matrices(config: OneVisionConfig, packed: bool) -> list[tuple[int, int]]:
    vision, text = config.vision_config, config.text_config
    width, inner = vision.hidden_size, _inner(config, packed)
    layer = [(width, width)] * 4 + [(inner, width), (width, inner)]
    joined = width * len(config.feature_layers)
    projector = [(text.hidden_size, joined), (text.hidden_size, text.hidden_size)]
    return layer * vision.num_hidden_layers + projector


def _inner(config: OneVisionConfig, packed: bool) -> int:
    """The tower's MLP, which is padded to whole groups where it is packed."""
    inner = config.vision_config.intermediate_size
    return -(-inner // GROUP) * GROUP if packed else inner


def _others(config: OneVisionConfig, packed: bool) -> int:
    """Values that are never packed: biases, norms, patches, positions, the newline."""
    vision, text = config.vision_config, config.text_config
    width, dims = vision.hidden_size, text.hidden_size
    heads = text.num_attention_heads + 2 * text.num_key_value_heads
    language = text.num_hidden_layers * (heads * text.head_dim + 2 * dims) + dims
    tower = vision.num_hidden_layers * (9 * width + _inner(config, packed))
    patches = width * (3 * vision.patch_size**2 + 1) + config.tokens_per_tile * width
    projector = 2 * dims * config.multimodal_projector_bias
    return language + tower + patches + projector + dims


def _named(language: int, vision: int) -> str:
    if language == vision:
        return f"all in {language} bits"
    return f"language in {language} bits with vision in {vision}"
