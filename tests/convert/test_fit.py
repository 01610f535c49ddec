"""Which recipe fits which Mac, for the published sizes; and what a stated prompt takes."""

import re
from functools import cache
from pathlib import Path

import pytest
from changed_checkpoints import quantize
from checkpoints import Sizes, write

from mlx_onevision.checkpoint import sharing
from mlx_onevision.checkpoint.load import open_checkpoint
from mlx_onevision.checkpoint.plan import make_plan
from mlx_onevision.checkpoint.recipes import MIXED, mixed, uniform
from mlx_onevision.checkpoint.tensors import Tensor
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.convert.fit import Fit, best, candidates, choose
from mlx_onevision.errors import RequestError
from mlx_onevision.network.footprint import (
    ANSWER_TOKENS,
    footprint,
    image_size,
    longest_context,
    usable_bytes,
)

# Width, MLP, layers, heads, heads of keys, vocabulary, tied; as in the published files.
PUBLISHED = {
    "0.5b": (896, 4864, 24, 14, 2, 152000, True),
    "7b": (3584, 18944, 28, 28, 4, 152128, False),
    "72b": (8192, 29568, 80, 64, 8, 152128, False),
}


def published(size: str, ranks: int = 1) -> tuple[OneVisionConfig, dict[str, Tensor]]:
    """A published model's configuration and the shapes of its tensors; weights, nobody needs. Of
    several ranks, what each has.
    """
    width, inner, layers, heads, kv_heads, vocab, tied = PUBLISHED[size]
    head_dim = width // heads
    config = OneVisionConfig.from_dict(
        {
            "model_type": "llava_onevision",
            "tie_word_embeddings": tied,
            "text_config": {
                "model_type": "qwen2",
                "hidden_size": width,
                "intermediate_size": inner,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "head_dim": head_dim,
                "vocab_size": vocab,
                "max_position_embeddings": 32768,
            },
        }
    )
    queries, keys = head_dim * heads, head_dim * kv_heads
    shapes: dict[str, tuple[int, ...]] = {
        "image_newline": (width,),
        "language_model.embed_tokens.weight": (vocab, width),
        "language_model.norm.weight": (width,),
        "multi_modal_projector.linear_1.weight": (width, 1152),
        "multi_modal_projector.linear_1.bias": (width,),
        "multi_modal_projector.linear_2.weight": (width, width),
        "multi_modal_projector.linear_2.bias": (width,),
        "vision_tower.embeddings.patch_embedding.weight": (1152, 14, 14, 3),
        "vision_tower.embeddings.patch_embedding.bias": (1152,),
        "vision_tower.embeddings.position_embedding.weight": (729, 1152),
    }
    if not tied:
        shapes["lm_head.weight"] = (vocab, width)
    for n in range(layers):
        layer = f"language_model.layers.{n}"
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, width)
            shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (width, queries)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inner, width)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inner, width)
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, inner)
        shapes[f"{layer}.input_layernorm.weight"] = (width,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
    for n in range(config.vision_config.num_hidden_layers):
        layer = f"vision_tower.encoder.layers.{n}"
        matrices = {f"self_attn.{name}": (1152, 1152) for name in ("q_proj", "k_proj", "v_proj")}
        matrices |= {"self_attn.out_proj": (1152, 1152), "mlp.fc1": (4304, 1152)}
        for name, shape in (matrices | {"mlp.fc2": (1152, 4304)}).items():
            shapes[f"{layer}.{name}.weight"] = shape
            shapes[f"{layer}.{name}.bias"] = shape[:1]
        for norm in ("layer_norm1", "layer_norm2"):
            shapes[f"{layer}.{norm}.weight"] = shapes[f"{layer}.{norm}.bias"] = (1152,)
    tensors = {}
    for name, shape in shapes.items():
        length = 2
        for edge in shape:
            length *= edge
        tensors[name] = Tensor(name, name, Path("none.safetensors"), "BF16", shape, 0, length)
    return (config, tensors) if ranks == 1 else sharing.share(config, tensors, 0, ranks)


def chosen(size: str, gigabytes: int, context: int | None = None) -> Fit:
    config, tensors = published(size)
    return best(config, tensors, {}, gigabytes << 30, context)


@pytest.mark.parametrize(
    ("size", "gigabytes", "name"),
    [
        ("0.5b", 8, None),
        ("0.5b", 128, None),
        ("7b", 8, "4-bit"),
        ("7b", 16, "8-bit"),
        ("7b", 32, None),
        ("7b", 128, None),
        ("72b", 64, "mixed_4_6"),
        ("72b", 128, "8-bit"),
    ],
)
def test_the_best_that_fits_a_mac(size: str, gigabytes: int, name: str | None) -> None:
    found = chosen(size, gigabytes)
    assert (found.recipe.name if found.recipe else None) == name
    usable = usable_bytes(gigabytes << 30)
    assert found.footprint.total <= usable < gigabytes << 30
    config, tensors = published(size)
    for better in candidates()[: candidates().index(found.recipe)]:
        plan = make_plan(config, tensors, {}, recipe=better)
        least = footprint(config, plan.nbytes, working_set=usable, quantized=bool(better))
        assert least.total > usable
    assert f"A Mac of {gigabytes} GB has" in found.why and "7,451 tokens" in found.why
    assert ("too large" in found.why) == (name is not None)


@pytest.mark.parametrize(("size", "gigabytes"), [("72b", 8), ("72b", 16), ("72b", 32), ("7b", 4)])
def test_nothing_fits(size: str, gigabytes: int) -> None:
    with pytest.raises(RequestError, match=r"nothing fits: a Mac of .* take a smaller model"):
        chosen(size, gigabytes)


@cache
def share(size: str, macs: int, number: int) -> tuple[str, int]:
    """With one of the candidates: what a table calls it, and the bytes of a Mac's share."""
    config, tensors = published(size, macs)
    recipe = candidates()[number]
    if recipe is None:
        return "16-bit", make_plan(config, tensors, {}).nbytes
    # A share is whole groups of quantized values.
    group = 64 if config.text_config.intermediate_size % 64 == 0 else 32
    name = recipe.name
    recipe = mixed(name, group) if name in MIXED else uniform(int(name[0]), group)
    return name + "*" * (group == 32), make_plan(config, tensors, {}, recipe=recipe).nbytes


def cell(size: str, gigabytes: int, macs: int) -> str:
    """The best recipe with which each Mac has room for its share, and the bytes of that."""
    config, usable = published(size, macs)[0], usable_bytes(gigabytes << 30)
    for number in range(len(candidates())):
        name, weights = share(size, macs, number)
        room = footprint(config, weights, working_set=usable, quantized=number > 0)
        if room.total <= usable:
            return f"{name}, {weights / 1e9:.1f} GB"
    return "none"


def test_the_tables_of_the_page() -> None:
    page = Path(__file__).parents[2].joinpath("docs/several-macs.md").read_text(encoding="utf-8")
    tables = {
        "| memory | `0.5b` | `7b` | `72b` |": [(size, 1) for size in PUBLISHED],
        "| memory | `7b`, 2 Macs | `72b`, 2 Macs | `72b`, 4 Macs |": [
            ("7b", 2),
            ("72b", 2),
            ("72b", 4),
        ],
    }
    for header, columns in tables.items():
        table = page.partition(header)[2].partition("\n\n")[0]
        rows = re.findall(r"^\| (\d+) GB \|", table, re.MULTILINE)
        assert rows[0] == "16" and rows[-1] == "512"
        for gigabytes in map(int, rows):
            cells = [cell(size, gigabytes, macs) for size, macs in columns]
            assert f"| {gigabytes} GB | {' | '.join(cells)} |" in table
    for size, gigabytes in (("0.5b", 16), ("7b", 16), ("72b", 64), ("72b", 192)):
        found = chosen(size, gigabytes)
        name = found.recipe.name if found.recipe else "16-bit"
        assert cell(size, gigabytes, 1) == f"{name}, {found.footprint.weights / 1e9:.1f} GB"


def test_the_table_of_the_readme() -> None:
    """The recipe that fits, and the longest context beside its weights."""
    table = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    table = table.partition("| memory | `0.5b` | `7b` | `72b` |")[2].partition("\n\n")[0]
    rows = [int(row) for row in re.findall(r"^\| (\d+) GB \|", table, re.MULTILINE)]
    assert rows == [8, 16, 24, 32, 64, 128]
    for gigabytes in rows:
        cells: list[str] = []
        for size in PUBLISHED:
            if cell(size, gigabytes, 1) == "none":
                cells.append("none")
                continue
            found, usable = chosen(size, gigabytes), usable_bytes(gigabytes << 30)
            longest = longest_context(
                published(size)[0],
                found.footprint.weights,
                usable,
                itemsize=2,
                quantized=found.recipe is not None,
            )
            cells.append(f"{found.recipe.name if found.recipe else '16-bit'}, {longest:,}")
        assert f"| {gigabytes} GB | {' | '.join(cells)} |" in table


def test_more_memory_and_shorter_prompts_never_cost_quality() -> None:
    order = candidates()
    ranks = [order.index(chosen("7b", n).recipe) for n in (8, 9, 10, 11, 12, 14, 16, 20, 24, 32)]
    assert ranks == sorted(ranks, reverse=True) and len(set(ranks)) > 4
    ranks = [order.index(chosen("7b", 12, n).recipe) for n in (32000, 16000, 8000, 1000)]
    assert ranks == sorted(ranks, reverse=True) and len(set(ranks)) > 1


def test_what_a_gpu_may_use() -> None:
    """As printed by Metal on such machines, in MiB."""
    for gigabytes, mebibytes in ((16, 10922.67), (32, 21845.34), (64, 49152), (96, 73728)):
        assert usable_bytes(gigabytes << 30) / 2**20 == pytest.approx(mebibytes, abs=0.1)


def test_the_stated_prompt() -> None:
    """One image of 3 x 3 tiles: 81 rows of 81 and a newline, and the base tile."""
    config, _ = published("7b")
    assert image_size(config).tokens == 729 + 81 * 82 == 7371
    room = footprint(config, 15 * 10**9)
    assert room.tokens == 7371 + 80 + ANSWER_TOKENS
    # 28 layers, 4 heads of 128, keys and values, 2 bytes: 57,344 bytes each of 31 x 256 positions,
    # and of 256 for a next turn.
    assert room.cache == 57_344 * 32 * 256
    assert room.scratch < 192 << 20
    for tokens, positions in ((512, 768), (513, 1024)):
        assert footprint(config, 10**9, tokens=tokens).cache == 57_344 * positions


def test_published_sizes() -> None:
    """The published 0.5B file holds 1.79 GB, the 7B 16 GB and the 72B 146 GB; each candidate is
    smaller than the one before it.
    """
    for size, gigabytes in (("0.5b", 1.79), ("7b", 16.06), ("72b", 146.3)):
        config, tensors = published(size)
        sizes = [make_plan(config, tensors, {}, recipe=recipe).nbytes for recipe in candidates()]
        assert sizes[0] / 1e9 == pytest.approx(gigabytes, rel=4e-3)
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)


def test_of_a_folder(tmp_path: Path) -> None:
    """From "as it is" down to what does not fit at all."""
    sizes = Sizes(hidden=256, intermediate=512, layers=4)
    folder = write(tmp_path / "model", sizes=sizes, dtype="bfloat16")
    opened = open_checkpoint(folder)
    for recipe in candidates():
        plan = make_plan(opened.config, opened.tensors, {}, recipe=recipe)
        room = footprint(  # in the smallest steps
            opened.config,
            plan.nbytes,
            tokens=100 + ANSWER_TOKENS,
            working_set=1,
            quantized=recipe is not None,
        ).total
        found = choose(folder, -(-room * 3 // 2), context=100)
        assert found.recipe == recipe and found.why.endswith("fits")
    with pytest.raises(RequestError, match=r"nothing fits: a Mac of 0\.00\d* GB has"):
        choose(folder, 2**20)
    with pytest.raises(RequestError, match="shorter --context"):
        choose(folder, 10**9, context=5 * 10**6)


def test_twice_the_room_in_single_precision(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    single, half = (choose(folder, 10**9, dtype=name).footprint for name in ("float32", "float16"))
    assert (single.cache, single.features) == (2 * half.cache, 2 * half.features)


def test_of_a_packed_model(tmp_path: Path) -> None:
    packed = quantize(write(tmp_path / "a", "mlx-vlm"), tmp_path / "b")
    assert choose(packed, 10**9).recipe is None
    with pytest.raises(RequestError, match="nothing fits"):
        choose(packed, 2**20)


def test_of_a_packed_model_that_is_dequantized(tmp_path: Path) -> None:
    """As of the unquantized one: what is counted is what will be written."""
    sizes = Sizes(hidden=256, intermediate=512, layers=4)
    folder = write(tmp_path / "a", "mlx-vlm", sizes=sizes, dtype="bfloat16")
    packed = quantize(folder, tmp_path / "b")
    opened = open_checkpoint(packed)
    dequantized = make_plan(opened.config, opened.tensors, opened.quantized, dequantize=True)
    assert choose(packed, 10**9, dequantize=True).footprint.weights == dequantized.nbytes
    plan = make_plan(
        opened.config, opened.tensors, opened.quantized, recipe=candidates()[1], dequantize=True
    )
    room = footprint(
        opened.config, plan.nbytes, tokens=100 + ANSWER_TOKENS, working_set=1, quantized=True
    ).total
    found = choose(packed, -(-room * 3 // 2), context=100, dequantize=True)
    assert found.recipe == candidates()[1] and found.footprint.weights == plan.nbytes
    with pytest.raises(RequestError, match="not quantized; leave --dequantize out"):
        choose(folder, 10**9, dequantize=True)
