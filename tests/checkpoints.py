"""Tiny random checkpoints for the tests, in every published layout.

    folder = write(tmp_path / "model", layout="lmms-lab", tied=False)

Weights come from a seed, so that two layouts of the same seed hold the same network. Tokenizers are
trained on the spot: byte-level BPE with Qwen2's splitting rule and control tokens.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

LAYOUTS = ("hub", "transformers-4.52", "transformers-5", "lmms-lab", "mlx-vlm")
CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class Sizes:
    """How large the network is; every width divides into groups of 64, so that it quantises."""

    image_size: int = 28
    patch_size: int = 14
    vision_hidden: int = 64
    vision_layers: int = 2
    vision_heads: int = 4
    vision_intermediate: int = 128
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 128
    vocab: int = 384  # more rows than the tokenizer has entries, as in the published ones
    grid: int = 3  # the pinpoints are every grid up to this many tiles a side


def arrays(sizes: Sizes = Sizes(), *, tied: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """The weights by canonical name, float32; the patch convolution is (out, in, height, width)."""
    rng = np.random.default_rng(seed)
    s, values = sizes, {}

    def matrix(name: str, *shape: int) -> None:
        fan_in = int(np.prod(shape[1:])) or 1
        values[name] = (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)

    def vector(name: str, size: int, around: float = 0.0) -> None:
        values[name] = (around + 0.1 * rng.standard_normal(size)).astype(np.float32)

    def linear(name: str, out: int, inner: int, bias: bool = True) -> None:
        matrix(f"{name}.weight", out, inner)
        if bias:
            vector(f"{name}.bias", out)

    def layer_norm(name: str, size: int) -> None:
        vector(f"{name}.weight", size, 1.0)
        vector(f"{name}.bias", size)

    width, embeddings = s.vision_hidden, "vision_tower.embeddings"
    matrix(f"{embeddings}.patch_embedding.weight", width, 3, s.patch_size, s.patch_size)
    vector(f"{embeddings}.patch_embedding.bias", width)
    patches = (s.image_size // s.patch_size) ** 2
    matrix(f"{embeddings}.position_embedding.weight", patches, width)
    for n in range(s.vision_layers):
        layer = f"vision_tower.encoder.layers.{n}"
        layer_norm(f"{layer}.layer_norm1", width)
        layer_norm(f"{layer}.layer_norm2", width)
        for part in ("q", "k", "v", "out"):
            linear(f"{layer}.self_attn.{part}_proj", width, width)
        linear(f"{layer}.mlp.fc1", s.vision_intermediate, width)
        linear(f"{layer}.mlp.fc2", width, s.vision_intermediate)
    layer_norm("vision_tower.post_layernorm", width)
    linear("multi_modal_projector.linear_1", s.hidden, width)
    linear("multi_modal_projector.linear_2", s.hidden, s.hidden)
    vector("image_newline", s.hidden)
    matrix("language_model.embed_tokens.weight", s.vocab, s.hidden)
    head = s.hidden // s.heads
    for n in range(s.layers):
        layer = f"language_model.layers.{n}"
        vector(f"{layer}.input_layernorm.weight", s.hidden, 1.0)
        vector(f"{layer}.post_attention_layernorm.weight", s.hidden, 1.0)
        linear(f"{layer}.self_attn.q_proj", s.heads * head, s.hidden)
        linear(f"{layer}.self_attn.k_proj", s.kv_heads * head, s.hidden)
        linear(f"{layer}.self_attn.v_proj", s.kv_heads * head, s.hidden)
        linear(f"{layer}.self_attn.o_proj", s.hidden, s.heads * head, bias=False)
        for part in ("gate", "up"):
            linear(f"{layer}.mlp.{part}_proj", s.intermediate, s.hidden, bias=False)
        linear(f"{layer}.mlp.down_proj", s.hidden, s.intermediate, bias=False)
    vector("language_model.norm.weight", s.hidden, 1.0)
    if not tied:
        linear("lm_head", s.vocab, s.hidden, bias=False)
    return values


def layout_name(name: str, layout: str) -> str:
    """A canonical name as a layout's files have it."""
    part, _, rest = name.partition(".")
    if layout in ("hub", "mlx-vlm"):
        parts = {
            "language_model": "language_model.model",
            "vision_tower": "vision_tower.vision_model",
            "lm_head": "language_model.lm_head",
        }
    elif layout == "transformers-4.52":
        parts = {
            "language_model": "model.language_model",
            "vision_tower": "model.vision_tower.vision_model",
            "multi_modal_projector": "model.multi_modal_projector",
            "image_newline": "model.image_newline",
        }
    elif layout == "transformers-5":
        parts = {"language_model": "language_model.model", "lm_head": "language_model.lm_head"}
    else:
        parts = {
            "language_model": "model",
            "vision_tower": "model.vision_tower.vision_tower.vision_model",
            "multi_modal_projector": "model.mm_projector",
            "image_newline": "model.image_newline",
        }
        rest = rest.replace("linear_1", "0").replace("linear_2", "2")
    return parts.get(part, part) + (f".{rest}" if rest else "")


def config(
    sizes: Sizes = Sizes(), layout: str = "hub", *, tied: bool = True, dtype: str = "float32"
) -> dict[str, Any]:
    """The config.json of a layout."""
    s = sizes
    ids = {token: n for n, token in enumerate(CONTROL)}
    old = layout in ("hub", "lmms-lab", "mlx-vlm")
    text: dict[str, Any] = {
        "model_type": "qwen2",
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "intermediate_size": s.intermediate,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "eos_token_id": ids["<|im_end|>"],
    }
    if old:
        text["rope_theta"] = 1e6
    else:
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
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
    placeholders = {"image_token_index": ids["<image>"], "video_token_index": ids["<video>"]}
    if layout == "lmms-lab":
        return {
            **text,
            **placeholders,
            "model_type": "llava",
            "architectures": ["LlavaQwenForCausalLM"],
            "torch_dtype": dtype,
            # The published ones name a tower instead of describing it; this size has no name.
            "mm_vision_tower": "google/siglip-so400m-patch14-384",
            "vision_config": vision,
            "mm_projector_type": "mlp2x_gelu",
            "mm_patch_merge_type": "spatial_unpad",
            "image_aspect_ratio": "anyres_max_9",
            "image_grid_pinpoints": pinpoints(s),
            "mm_newline_position": "one_token",
            "mm_spatial_pool_mode": "bilinear",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
        }
    return {
        **placeholders,
        "model_type": "llava_onevision",
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        ("torch_dtype" if old else "dtype"): dtype,
        "text_config": text,
        "vision_config": vision,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
        "projector_hidden_act": "gelu",
        "image_grid_pinpoints": pinpoints(s),
        "tie_word_embeddings": False,
    }


def pinpoints(sizes: Sizes) -> list[list[int]]:
    edges = [sizes.image_size * (n + 1) for n in range(sizes.grid)]
    return [[height, width] for height in edges for width in edges]


def write(
    folder: Path,
    layout: str = "hub",
    sizes: Sizes = Sizes(),
    *,
    tied: bool = True,
    dtype: str = "float32",
    seed: int = 0,
    shards: int = 1,
    template: str = "space",
    weights: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """A whole checkpoint; ``weights`` (canonical names) instead of those that the seed makes."""
    folder.mkdir(parents=True, exist_ok=True)
    dump(folder / "config.json", config(sizes, layout, tied=tied, dtype=dtype))
    eos = CONTROL.index("<|im_end|>")
    dump(folder / "generation_config.json", {"_from_model_config": True, "eos_token_id": eos})
    values = dict(arrays(sizes, tied=tied, seed=seed) if weights is None else weights)
    if layout == "mlx-vlm":  # channels last, and nothing that is never used
        name = "vision_tower.embeddings.patch_embedding.weight"
        values[name] = np.ascontiguousarray(values[name].transpose(0, 2, 3, 1))
        values = {name: v for name, v in values.items() if "post_layernorm" not in name}
    named = {layout_name(name, layout): value for name, value in values.items()}
    write_weights(folder, named, dtype=dtype, shards=shards, index=layout == "mlx-vlm")
    if layout == "lmms-lab":
        write_processor(folder, None, sizes.image_size, sizes.patch_size, pinpoints(sizes))
    else:
        write_processor(folder, template, sizes.image_size, sizes.patch_size, pinpoints(sizes))
    return folder


def write_weights(
    folder: Path,
    values: Mapping[str, np.ndarray],
    *,
    dtype: str = "float32",
    shards: int = 1,
    index: bool = False,
) -> None:
    """safetensors files under the names given; an index where there are several files."""
    names = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    if shards == 1:
        names = ["model.safetensors"]
    weight_map = {name: names[n * shards // len(values)] for n, name in enumerate(values)}
    for file in names:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        data = b""
        for name, value in values.items():
            if weight_map[name] == file:
                start, data = len(data), data + encode(value, dtype)
                span = {"shape": list(value.shape), "data_offsets": [start, len(data)]}
                header[name] = {"dtype": CODES[dtype], **span}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + data)
    if shards > 1 or index:
        total = sum(value.nbytes for value in values.values())
        dump(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )


def encode(value: np.ndarray, dtype: str) -> bytes:
    """float32 values as bytes of a type that numpy may lack; bfloat16 rounds to even."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()
    return np.ascontiguousarray(value, dtype).tobytes()


# Tokenizers, chat templates and preprocessor files.


CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")

# Both generations of the reference's chat template, by what follows the role.
SPACE_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{# Render all video then #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\\n' + content['text'] }}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
    "{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NEWLINE_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{# Render all video then #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>\\n' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
    "{{'<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES: Mapping[str, str] = {"space": SPACE_TEMPLATE, "newline": NEWLINE_TEMPLATE}

WORDS = """
    Describe the picture in a few words. What is in this image and in the video? Which colour is
    the circle, the square, the triangle, the star? Where is it: left, right, top or bottom? You are
    a helpful assistant. one two three four five six seven eight nine ten, naïve café, 日本語, 🙂
"""


def write_processor(
    folder: Path, template: str | None, image_size: int, patch_size: int, pinpoints: Any
) -> None:
    """Tokenizer, chat template ("space" as .json, "newline" as .jinja) and preprocessor files; the
    tokenizer alone without a template, as the original repositories have it.
    """
    (folder / "tokenizer.json").write_text(tokenizer_json())
    tokenizer: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "model_max_length": 32768,
        "padding_side": "right",
    }
    dump(folder / "tokenizer_config.json", tokenizer)
    if template is None:
        return
    if template == "space":
        dump(folder / "chat_template.json", {"chat_template": TEMPLATES[template]})
    else:
        (folder / "chat_template.jinja").write_text(TEMPLATES[template])
    pixels = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": image_size, "width": image_size},
    }
    image = {
        **pixels,
        "do_pad": True,
        "image_grid_pinpoints": pinpoints,
        "image_processor_type": "LlavaOnevisionImageProcessor",
    }
    dump(folder / "preprocessor_config.json", image)
    dump(
        folder / "video_preprocessor_config.json",
        {**pixels, "video_processor_type": "LlavaOnevisionVideoProcessor"},
    )
    dump(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaOnevisionProcessor",
            "image_token": "<image>",
            "video_token": "<video>",
            "num_image_tokens": (image_size // patch_size) ** 2,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
    )


@cache
def tokenizer_json() -> str:
    """A byte-level BPE of 320 entries; the control tokens have the lowest ids, in their order."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(WORDS.split("."), trainer)
    return tokenizer.to_str()


def dump(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1))
