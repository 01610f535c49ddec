"""Which part of a checkpoint each rank holds of a language model that ranks share.

Each has its heads, and its part of the MLPs' inner values, in every layer. Of the embedding it has
a part of each row, which costs a gather of the tokens' values. A head is whole on every rank, and
so is an embedding that is the head, too: what each rank made with a part of it would have to be
summed, and a token's logits are more than three times as many bytes as all sums in the layers of
the 0.5B model. Tower and projector are whole as well.

Or each rank has some of the layers whole; see :mod:`~mlx_onevision.network.stages`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from functools import partial

import mlx.core as mx

from mlx_onevision.checkpoint.adapters import Adapter, LowRank
from mlx_onevision.checkpoint.plan import ConversionPlan, TensorTransform
from mlx_onevision.checkpoint.tensors import EMBEDDING, HEAD, Tensor
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.distributed import gather_integers
from mlx_onevision.errors import RequestError
from mlx_onevision.network.layers import on_cuda
from mlx_onevision.network.stages import Split, Stage, counts, of_layers

NORM = "language_model.norm"
LAST = (HEAD, NORM)  # what the rank with the last layers has
LAYERS = "language_model.layers."
LAYER = re.compile(r"language_model\.layers\.(\d+)\.")
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
    parts = {n: _part(tensor, _axis(n, tied), rank, ranks) for n, tensor in tensors.items()}
    return dataclasses.replace(config, text_config=own), parts


def _axis(name: str, tied: bool) -> int | None:
    """Along which ranks divide a tensor: that of the outputs of the matrices that read the hidden
    states, of the inputs of those that add to them, and of the values of the embedding's rows.
    """
    found = LAYER_MATRIX.fullmatch(name)
    if found is not None:
        return 1 if found[1] in SUMMED else 0
    return 1 if name.rpartition(".")[0] == EMBEDDING and not tied else None


def _part(tensor: Tensor, axis: int | None, rank: int, ranks: int) -> Tensor:
    if axis is None:
        return tensor
    shape = list(tensor.shape)
    shape[axis] //= ranks
    return dataclasses.replace(tensor, shape=tuple(shape), part=(axis, rank, ranks))


def share_adapter(adapter: Adapter, tied: bool, rank: int, ranks: int) -> Adapter:
    """A rank's part of an adapter that fits the whole model."""

    def part(name: str, term: LowRank) -> LowRank:
        axis = _axis(f"{name}.weight", tied)
        if axis is None:
            return term
        if axis == 1 and name != EMBEDDING:
            a = _part(term.a, 1 if term.transposed else 0, rank, ranks)
            return dataclasses.replace(term, a=a, summed=True)
        b = _part(term.b, 0 if term.transposed else 1, rank, ranks)
        return dataclasses.replace(term, b=b, m=term.m and _part(term.m, 0, rank, ranks))

    return dataclasses.replace(
        adapter,
        low_rank={name: part(name, term) for name, term in adapter.low_rank.items()},
        whole={n: _part(t, _axis(n, tied), rank, ranks) for n, t in adapter.whole.items()},
    )


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


def make_stage(
    plan: ConversionPlan, group: mx.distributed.Group, split: Split, limit: int
) -> Stage:
    """The layers that a rank has of a planned model. ``limit`` : bytes that it may use.

    Raises:
        RequestError: for shares that are not one for each rank, for fewer layers than ranks, and
            where MLX cannot send.
    """
    number, ranks = plan.config.text_config.num_hidden_layers, group.size()
    if on_cuda():
        raise RequestError("MLX cannot send from one GPU to the next on CUDA; leave --split out")
    if split != "auto" and (len(split) != ranks or min(split) <= 0):
        raise RequestError(
            f"--split has {len(split)} shares for {ranks} ranks; give one above 0 for each rank, "
            "in the order of the hostfile, or auto"
        )
    if ranks > number:
        raise RequestError(
            f"{number} layers cannot be divided among {ranks} ranks; start mlx.launch with fewer"
        )
    layers, first, last = [0] * number, 0, 0
    for output in (output for one in plan.transforms for output in one.outputs):
        if found := LAYER.match(output.name):
            layers[int(found[1])] += output.nbytes
            continue
        is_table = output.name.startswith(EMBEDDING)
        first += output.nbytes if is_table or not output.name.startswith(LAST) else 0
        tied = is_table and plan.config.tie_word_embeddings
        last += output.nbytes if tied or output.name.startswith(LAST) else 0
    limits = [limit for (limit,) in gather_integers([limit], group)]
    return Stage(group, counts(split, layers, first, last, limits))


def plan_of_stage(plan: ConversionPlan, stage: Stage) -> ConversionPlan:
    """A rank's part of a plan; its layers are counted from 0."""
    own_name = partial(_own_name, stage, plan.config.tie_word_embeddings)
    transforms: list[TensorTransform] = []
    for one in plan.transforms:
        outputs = [
            dataclasses.replace(output, name=own)
            for output in one.outputs
            if (own := own_name(output.name)) is not None
        ]
        if outputs:
            transforms.append(dataclasses.replace(one, outputs=tuple(outputs)))
    named = ((own_name(f"{module}."), spec) for module, spec in plan.specs.items())
    specs = {own.removesuffix("."): spec for own, spec in named if own is not None}
    return dataclasses.replace(
        plan,
        config=of_layers(plan.config, stage.layers),
        transforms=tuple(transforms),
        specs=specs,
    )


def adapter_of_stage(adapter: Adapter, tied: bool, stage: Stage) -> Adapter:
    """A rank's part of an adapter that fits the whole model."""
    own_name = partial(_own_name, stage, tied)
    return dataclasses.replace(
        adapter,
        low_rank={own: t for name, t in adapter.low_rank.items() if (own := own_name(name))},
        whole={own: t for name, t in adapter.whole.items() if (own := own_name(name))},
    )


def _own_name(stage: Stage, tied: bool, name: str) -> str | None:
    """The name that a rank has for a module or a tensor; None for what it does not have."""
    if found := LAYER.match(name):
        number = int(found[1])
        own = f"{LAYERS}{number - stage.layers.start}.{name[found.end() :]}"
        return own if number in stage.layers else None
    if name.startswith(EMBEDDING):
        return name if stage.begins or (tied and stage.ends) else None
    if name.startswith(HEAD):
        return name if stage.ends else None
    return name if stage.begins or name.startswith(NORM) else None
