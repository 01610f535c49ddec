# pyright: reportUnknownMemberType=false
"""The checkpoint folder that a benchmark runs on: random weights at the published shapes, or a
given model; quantized or cast if asked; and always one whose answers do not end by themselves.

Speed does not depend on what the weights are. It does depend on the length of an answer, so the
folder's generation_config.json names no end-of-text token.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_onevision.errors import OneVisionError, RequestError, StorageError
from mlx_onevision.files import read_json
from mlx_onevision.prompt.tokenizer import QWEN2_WORDS
from mlx_onevision.subprocesses import import_path

FIRST_CONTROL = 151643
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
WORDS = ("user", "assistant", " describe", " this", " in", " detail", " please", " and", " more")
GRID = 6  # image_grid_pinpoints holds every grid of up to 6 x 6 tiles
SHARD_BYTES = 2 << 30
BLOCK = (1 << 20) - 3  # values that a large tensor repeats; odd, so that no two rows are the same
DEVIATION = 0.02  # of the random weights

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% endif %}"
    "{% if part['type'] == 'video' %}{{ '<video>' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ '\\n' + part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """How large a network is; the tower's numbers are those of SigLIP so400m at 384 pixels."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool = False
    vision_hidden: int = 1152
    vision_layers: int = 26
    vision_heads: int = 16
    vision_intermediate: int = 4304
    image_size: int = 384
    patch_size: int = 14


# llava-hf/llava-onevision-qwen2-{size}-ov-hf, config.json
SIZES: Mapping[str, Shape] = {
    "0.5b": Shape(896, 24, 14, 2, 4864, 152000, tied=True),
    "7b": Shape(3584, 28, 28, 4, 18944, 152128),
    "72b": Shape(8192, 80, 64, 8, 29568, 152128),
}


def make_random(
    folder: Path, shape: Shape, *, layers: int | None, dtype: str, say: Callable[[str], None]
) -> Path:
    """Writes a checkpoint in the Hub's layout, which other programs load too.

    layers : only the first so many of the language model.

    Raises:
        RequestError: for more layers than the shape has.
        StorageError: where the disk has no room for it.
    """
    if layers and layers > shape.layers:
        raise RequestError(
            f"the size has {shape.layers} layers, so --layers {layers} is too many; give at most "
            f"{shape.layers}"
        )
    shape = replace(shape, layers=layers or shape.layers)
    folder.mkdir()
    write_settings(folder, shape, dtype)
    size = getattr(mx, dtype).size
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room, total = SHARD_BYTES, 0
    for name, dims in tensors(shape):
        needed = prod(dims) * size
        if needed > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = dims
        room, total = room - needed, total + needed
    free = shutil.disk_usage(folder).free
    if total > free:
        raise StorageError(
            f"the random weights take {total / 1e9:.0f} GB, and the folder for temporary files has "
            f"{free / 1e9:.0f} GB; set TMPDIR to a larger disk, or cut the model with --layers"
        )
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        say(f"random weights, {total / 1e9:.1f} GB: {name}")
        arrays = {key: _values(key, dims, getattr(mx, dtype)) for key, dims in shard.items()}
        mx.save_safetensors(str(folder / name), arrays, metadata={"format": "pt"})
        del arrays
        mx.clear_cache()
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _dump(folder / "model.safetensors.index.json", index)
    return folder


def _values(name: str, dims: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """A tensor of shape ``dims``: norms that change nothing, random values for all others."""
    if name.endswith("norm.weight") or "layernorm.weight" in name or "layer_norm" in name:
        return mx.ones(dims, dtype) if name.endswith("weight") else mx.zeros(dims, dtype)
    count = prod(dims)
    block = (DEVIATION * mx.random.normal((min(count, BLOCK),), key=mx.random.key(0))).astype(dtype)
    return mx.tile(block, -(-count // BLOCK))[:count].reshape(dims)


def tensors(s: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of a checkpoint's tensors, in the Hub's layout."""

    def linear(
        name: str, out: int, inner: int, bias: bool = True
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (out, inner)
        if bias:
            yield f"{name}.bias", (out,)

    tower, text = "vision_tower.vision_model", "language_model.model"
    width, head = s.vision_hidden, s.hidden // s.heads
    yield f"{tower}.embeddings.patch_embedding.weight", (width, 3, s.patch_size, s.patch_size)
    yield f"{tower}.embeddings.patch_embedding.bias", (width,)
    patches = (s.image_size // s.patch_size) ** 2
    yield f"{tower}.embeddings.position_embedding.weight", (patches, width)
    norms = [f"encoder.layers.{n}.layer_norm{i}" for n in range(s.vision_layers) for i in (1, 2)]
    for norm in (*norms, "post_layernorm"):
        yield f"{tower}.{norm}.weight", (width,)
        yield f"{tower}.{norm}.bias", (width,)
    for n in range(s.vision_layers):
        layer = f"{tower}.encoder.layers.{n}"
        for part in ("q", "k", "v", "out"):
            yield from linear(f"{layer}.self_attn.{part}_proj", width, width)
        yield from linear(f"{layer}.mlp.fc1", s.vision_intermediate, width)
        yield from linear(f"{layer}.mlp.fc2", width, s.vision_intermediate)
    yield from linear("multi_modal_projector.linear_1", s.hidden, width)
    yield from linear("multi_modal_projector.linear_2", s.hidden, s.hidden)
    yield "image_newline", (s.hidden,)
    yield f"{text}.embed_tokens.weight", (s.vocab, s.hidden)
    for n in range(s.layers):
        layer = f"{text}.layers.{n}"
        yield f"{layer}.input_layernorm.weight", (s.hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (s.hidden,)
        for part, heads in (("q", s.heads), ("k", s.kv_heads), ("v", s.kv_heads)):
            yield from linear(f"{layer}.self_attn.{part}_proj", heads * head, s.hidden)
        yield from linear(f"{layer}.self_attn.o_proj", s.hidden, s.heads * head, bias=False)
        yield from linear(f"{layer}.mlp.gate_proj", s.intermediate, s.hidden, bias=False)
        yield from linear(f"{layer}.mlp.up_proj", s.intermediate, s.hidden, bias=False)
        yield from linear(f"{layer}.mlp.down_proj", s.hidden, s.intermediate, bias=False)
    yield f"{text}.norm.weight", (s.hidden,)
    if not s.tied:
        yield "language_model.lm_head.weight", (s.vocab, s.hidden)


def write_settings(folder: Path, s: Shape, dtype: str) -> None:
    """Everything but the weights: configuration, tokenizer, chat template, preprocessors."""
    edges = [s.image_size * (n + 1) for n in range(GRID)]
    pinpoints = [[height, width] for height in edges for width in edges]
    end, pad = FIRST_CONTROL + 2, FIRST_CONTROL
    text = {
        "model_type": "qwen2",
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "intermediate_size": s.intermediate,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": s.tied,
        "eos_token_id": end,
        "pad_token_id": pad,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": s.vision_hidden,
        "intermediate_size": s.vision_intermediate,
        "num_hidden_layers": s.vision_layers,
        "num_attention_heads": s.vision_heads,
        "image_size": s.image_size,
        "patch_size": s.patch_size,
        "vision_use_head": False,
    }
    config = {
        "model_type": "llava_onevision",
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "torch_dtype": dtype,
        "image_token_index": FIRST_CONTROL + CONTROL.index("<image>"),
        "video_token_index": FIRST_CONTROL + CONTROL.index("<video>"),
        "text_config": text,
        "vision_config": vision,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
        "projector_hidden_act": "gelu",
        "image_grid_pinpoints": pinpoints,
        "tie_word_embeddings": s.tied,
    }
    _dump(folder / "config.json", config)
    pixels = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": s.image_size, "width": s.image_size},
    }
    processor = {"processor_class": "LlavaOnevisionProcessor"}
    image = {"image_processor_type": "LlavaOnevisionImageProcessor", "do_pad": True}
    image |= {"image_grid_pinpoints": pinpoints}
    video = {"video_processor_type": "LlavaOnevisionVideoProcessor"}
    _dump(folder / "preprocessor_config.json", {**pixels, **image, **processor})
    _dump(folder / "video_preprocessor_config.json", {**pixels, **video, **processor})
    processor |= {"image_token": "<image>", "video_token": "<video>"}
    processor |= {"vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"}
    rows = {"num_image_tokens": (s.image_size // s.patch_size) ** 2}
    _dump(folder / "processor_config.json", {**processor, **rows})
    _dump(folder / "chat_template.json", {"chat_template": TEMPLATE})
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    decoder = {
        str(FIRST_CONTROL + n): {"content": token, "special": True, **flags}
        for n, token in enumerate(CONTROL)
    }
    tokenizer = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder}
    tokenizer |= {"eos_token": CONTROL[2], "pad_token": CONTROL[0], "bos_token": None}
    _dump(folder / "tokenizer_config.json", {**tokenizer, "model_max_length": 32768})


def tokenizer_json() -> str:
    """A byte-level BPE with Qwen2's ids for control tokens. It knows a few words; all other entries
    are numbers that only a model writes, so that every generated id has a text.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as pre

    entries = dict.fromkeys(sorted(pre.ByteLevel.alphabet()))
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        letters = word.replace(" ", "Ġ")
        for n in range(1, len(letters)):
            merges[letters[:n], letters[n]] = None
            entries[letters[: n + 1]] = None
    numbers = (f"Ġ{n}" for n in range(FIRST_CONTROL))
    names = [*entries, *numbers][:FIRST_CONTROL]
    vocab = {name: n for n, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab, list(merges)))
    backend.normalizer = normalizers.NFC()
    split = pre.Split(Regex(QWEN2_WORDS), "isolated")
    byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL])
    return backend.to_str()


def without_end(folder: Path, source: Path) -> Path:
    """A folder of the files of ``source``, its weights linked; answers are greedy and endless."""
    folder.mkdir()
    # A manifest would not fit the generation_config.json.
    left = ("generation_config.json", "mlx_onevision_manifest.json")
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            (folder / file.name).symlink_to(file.resolve())
        elif file.is_file() and file.name not in left:
            shutil.copyfile(file, folder / file.name)
    config = read_json(source / "generation_config.json") or {}
    pad = {"pad_token_id": config["pad_token_id"]} if "pad_token_id" in config else {}
    _dump(folder / "generation_config.json", {"do_sample": False, **pad})
    return folder


def converted(folder: Path, source: Path, bits: int | None, dtype: str | None) -> Path:
    """``source`` as ``mlx-onevision convert`` writes it, in a process of its own.

    Raises:
        OneVisionError: with what the converter says.
    """
    command = [
        sys.executable,
        "-m",
        "mlx_onevision",
        "convert",
        str(source.absolute()),
        str(folder),
    ]
    command += ["-q", "--q-bits", str(bits)] if bits else []
    command += ["--dtype", dtype] if dtype else []
    command.append("--no-verify")
    done = subprocess.run(  # noqa: S603 (this interpreter, this package)
        command, capture_output=True, text=True, env=environment()
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise OneVisionError(f"the model could not be converted: {last.removeprefix('error: ')}")
    return folder


def environment() -> dict[str, str]:
    """For a process that imports this package and what is beside it, and downloads nothing."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(import_path()), "HF_HUB_OFFLINE": "1"}


def _dump(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")
