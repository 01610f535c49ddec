"""Which part of a checkpoint each rank holds of a language model that ranks share.

Each has its heads, and its part of the MLPs' inner values, in every layer. Of the embedding it has
a part of each row, which costs a gather of the tokens' values. A head is whole on every rank, and
so is an embedding that is the head, too: what each rank made with a part of it would have to be
summed, and a token's logits are more than three times as many bytes as all sums in the layers of
the 0.5B model. Tower and projector are whole as well.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

from mlx_onevision.checkpoint.plan import ConversionPlan
from mlx_onevision.checkpoint.tensors import Tensor
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.errors import RequestError

EMBEDDING = "language_model.embed_tokens"
LAYER_MATRIX = re.compile(r"language_model\.layers\.\d+\.(?:self_attn|mlp)\.(\w+_proj)\.\w+")
SUMMED = ("o_proj", "down_proj")


def share(
    config: OneVisionConfig, tensors: Mapping[str, Tensor], rank: int, ranks: int
) -> tuple[OneVisionConfig, dict[str, Tensor]]:
    """What a rank computes of a model, and its parts of the tensors."""
    text = config.text_config
    own = dataclasses.replace(
        text,
        num_attention_heads=text.num_attention_heads // ranks,
        num_key_value_heads=text.num_key_value_heads // ranks,
        intermediate_size=text.intermediate_size // ranks,
    )
    tied = config.tie_word_embeddings
    parts = {name: _part(tensor, tied, rank, ranks) for name, tensor in tensors.items()}
    return dataclasses.replace(config, text_config=own), parts


def _part(tensor: Tensor, tied: bool, rank: int, ranks: int) -> Tensor:
    """A rank's part of a tensor: of the outputs of the matrices that read the hidden states, of the
    inputs of those that add to them, and of the rows of the embedding.
    """
    found = LAYER_MATRIX.fullmatch(tensor.name)
    if found is not None:
        axis = 1 if found[1] in SUMMED else 0
    elif tensor.name.rpartition(".")[0] == EMBEDDING and not tied:
        axis = 1
    else:
        return tensor
    shape = list(tensor.shape)
    shape[axis] //= ranks
    return dataclasses.replace(tensor, shape=tuple(shape), part=(axis, rank, ranks))


def check_ranks(plan: ConversionPlan, ranks: int) -> None:
    """RequestError, with the numbers that work, where the model does not divide among so many
    ranks.
    """
    text = plan.config.text_config
    sizes = {
        "o_proj": text.num_attention_heads * text.head_dim,
        "down_proj": text.intermediate_size,
        "embed_tokens": text.hidden_size,
    }
    together = {"o_proj": text.head_dim, "down_proj": 1, "embed_tokens": 1}  # inputs that stay so
    if plan.config.tie_word_embeddings:
        del sizes["embed_tokens"]
    for module, spec in plan.specs.items():
        name = module.rpartition(".")[2]
        if name in sizes and module.startswith("language_model."):
            together[name] = math.lcm(together[name], spec.group_size)
    working = [
        n
        for n in range(1, text.num_key_value_heads + 1)
        if text.num_key_value_heads % n == 0
        and all(size % (n * together[name]) == 0 for name, size in sizes.items())
    ]
    if ranks not in working:
        raise RequestError(
            f"a model of {text.num_attention_heads} attention heads, {text.num_key_value_heads} of "
            f"them for keys, {text.intermediate_size} inner and {text.hidden_size} hidden values "
            f"does not divide among {ranks} ranks; start mlx.launch with -n "
            f"{' or '.join(map(str, working))}"
        )
