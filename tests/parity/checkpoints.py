"""Tiny random LLaVA-OneVision checkpoints in the Hub's original file layout, written without torch.

The file set, the tensor names and the keys of config.json are those of the published
``llava-onevision-qwen2-*-ov-hf`` folders; only the sizes differ. Every tensor is drawn from its own
name and the seed, so that two checkpoints that differ in one setting share all other weights. The
scales are chosen for a network whose logits are spread out (greedy choices are not near-ties) and
depend on every part of it.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from parity.templates import TEMPLATES
from parity.tiny_tokenizer import SPECIAL_TOKENS, write_tokenizer
from safetensors.numpy import save_file

ABSENT = "(absent)"
"""As an override's value: the key is left out of the file."""

# What the reference's classes fill in for keys that a file leaves out.
TEXT_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
VISION_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}


@dataclass(frozen=True)
class Tiny:
    """One checkpoint: sizes, and what its files say beyond them.

    ``tile`` and ``patch`` are edges in pixels, ``sides`` the tile counts that the grid list is the
    square of. ``spare_rows`` are rows of the embedding past the tokenizer's length, as the
    published checkpoints have. ``text``, ``vision``, ``top`` and ``files`` override keys of the
    text, vision and outer configuration, and whole JSON files by name (ABSENT leaves one out).
    """

    seed: int = 2
    tile: int = 56
    patch: int = 14
    sides: int = 6
    v_hidden: int = 64
    v_layers: int = 3
    v_heads: int = 4
    v_inter: int = 144
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    inter: int = 160
    spare_rows: int = 8
    tied: bool = True
    template: str = "space"
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    top: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A folder name for the four main kinds."""
        return f"{'tied' if self.tied else 'untied'}-{self.template}"


def write_checkpoint(folder: Path, tiny: Tiny) -> Path:
    """Writes the whole folder, float32, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(folder)
    config = make_config(tiny, ids)
    files: dict[str, Any] = {
        "config.json": config,
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "transformers_version": "4.45.0.dev0",
        },
        "chat_template.json": {"chat_template": TEMPLATES[tiny.template]},
        **processor_files(config),
        **tiny.files,
    }
    for name, content in files.items():
        if content != ABSENT:
            (folder / name).write_text(json.dumps(content, indent=2))
    weights = make_weights(config, tiny.seed)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_config(tiny: Tiny, ids: Mapping[str, int]) -> dict[str, Any]:
    """config.json with the keys that transformers 4.45 wrote for the published checkpoints."""
    tile = tiny.tile
    text = {
        "_name_or_path": "Qwen/Qwen2-0.5B-Instruct",
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": tiny.hidden,
        "initializer_range": 0.02,
        "intermediate_size": tiny.inter,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": tiny.heads,
        "num_hidden_layers": tiny.layers,
        "num_key_value_heads": tiny.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tiny.tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": max(ids.values()) + 1 + tiny.spare_rows,
    }
    vision = {
        "attention_dropout": 0.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": tiny.v_hidden,
        "image_size": tile,
        "intermediate_size": tiny.v_inter,
        "layer_norm_eps": 1e-06,
        "model_type": "siglip_vision_model",
        "num_attention_heads": tiny.v_heads,
        "num_channels": 3,
        "num_hidden_layers": tiny.v_layers,
        "patch_size": tiny.patch,
        "vision_use_head": False,
    }
    sides = range(1, tiny.sides + 1)
    top = {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "ignore_index": -100,
        "image_grid_pinpoints": [[tile * h, tile * w] for h in sides for w in sides],
        "image_token_index": ids["<image>"],
        "model_type": "llava_onevision",
        "projector_hidden_act": "gelu",
        "text_config": _merge(text, tiny.text),
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.45.0.dev0",
        "use_image_newline_parameter": True,
        "video_token_index": ids["<video>"],
        "vision_aspect_ratio": "anyres_max_9",
        "vision_config": _merge(vision, tiny.vision),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    return _merge(top, tiny.top)


def processor_files(config: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json, its video twin and processor_config.json, for a configuration."""
    vision = {**VISION_DEFAULTS, **config["vision_config"]}
    tile = vision["image_size"]
    steps = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "LlavaOnevisionProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": tile, "width": tile},
    }
    image = {
        "do_pad": True,
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "image_processor_type": "LlavaOnevisionImageProcessor",
    }
    return {
        "preprocessor_config.json": steps | image,
        "video_preprocessor_config.json": steps
        | {"video_processor_type": "LlavaOnevisionVideoProcessor"},
        "processor_config.json": {
            "image_token": "<image>",
            "num_image_tokens": (tile // vision["patch_size"]) ** 2,
            "processor_class": "LlavaOnevisionProcessor",
            "video_token": "<video>",
            "vision_aspect_ratio": config.get("vision_aspect_ratio", "anyres_max_9"),
            "vision_feature_select_strategy": "full",
        },
    }


def make_weights(config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """All tensors by their names in the Hub's original layout, float32."""
    return {name: _draw(name, shape, seed) for name, shape in tensor_shapes(config).items()}


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names (the Hub's original layout) and shapes of a checkpoint's tensors."""
    text = {**TEXT_DEFAULTS, **config["text_config"]}
    vision = {**VISION_DEFAULTS, **config["vision_config"]}
    chosen = config.get("vision_feature_layer", -1)
    joined = len(chosen) if isinstance(chosen, list) else 1
    dims, wide = text["hidden_size"], vision["hidden_size"]
    patch = vision["patch_size"]
    head = text.get("head_dim") or dims // text["num_attention_heads"]
    queries, keys = (text[k] * head for k in ("num_attention_heads", "num_key_value_heads"))

    shapes: dict[str, tuple[int, ...]] = {"image_newline": (dims,)}
    bias = config.get("multimodal_projector_bias", True)

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    def layer_norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (wide,)

    linear("multi_modal_projector.linear_1", dims, wide * joined, bias)
    linear("multi_modal_projector.linear_2", dims, dims, bias)
    tower = "vision_tower.vision_model"
    shapes[f"{tower}.embeddings.patch_embedding.weight"] = (wide, 3, patch, patch)
    shapes[f"{tower}.embeddings.patch_embedding.bias"] = (wide,)
    positions = (vision["image_size"] // patch) ** 2
    shapes[f"{tower}.embeddings.position_embedding.weight"] = (positions, wide)
    layer_norm(f"{tower}.post_layernorm")
    for i in range(vision["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{i}"
        for norm in ("layer_norm1", "layer_norm2"):
            layer_norm(f"{layer}.{norm}")
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}.self_attn.{part}", wide, wide)
        linear(f"{layer}.mlp.fc1", vision["intermediate_size"], wide)
        linear(f"{layer}.mlp.fc2", wide, vision["intermediate_size"])
    decoder = "language_model.model"
    shapes[f"{decoder}.embed_tokens.weight"] = (text["vocab_size"], dims)
    shapes[f"{decoder}.norm.weight"] = (dims,)
    for i in range(text["num_hidden_layers"]):
        layer = f"{decoder}.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (dims,)
        linear(f"{layer}.self_attn.q_proj", queries, dims)
        for part in ("k_proj", "v_proj"):
            linear(f"{layer}.self_attn.{part}", keys, dims)
        linear(f"{layer}.self_attn.o_proj", dims, queries, bias=False)
        for part in ("gate_proj", "up_proj"):
            linear(f"{layer}.mlp.{part}", text["intermediate_size"], dims, bias=False)
        linear(f"{layer}.mlp.down_proj", dims, text["intermediate_size"], bias=False)
    if not (text.get("tie_word_embeddings", False) or config.get("tie_word_embeddings", False)):
        shapes["language_model.lm_head.weight"] = (text["vocab_size"], dims)
    return shapes


def _draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    normal = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
    if "norm" in name and name.endswith("weight"):
        values = 1 + 0.1 * normal
    elif name.endswith("bias"):
        values = 0.05 * normal
    elif any(part in name for part in ("embed_tokens", "lm_head", "image_newline")):
        values = 0.15 * normal
    elif "position_embedding" in name:
        values = 0.5 * normal
    else:  # a matrix or the patch convolution, by how much it widens its input
        gain = 1.0
        if any(part in name for part in ("q_proj", "k_proj", "patch_embedding")):
            gain = 1.4
        elif any(part in name for part in ("o_proj", "down_proj")):
            gain = 3.0  # what was read outweighs the token itself, or tied answers would repeat it
        values = gain * normal / np.sqrt(np.prod(shape[1:]))
    return values.astype(np.float32)


def _merge(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**values, **overrides}
    return {key: value for key, value in merged.items() if value != ABSENT}


__all__ = ["ABSENT", "SPECIAL_TOKENS", "Tiny", "make_config", "make_weights", "write_checkpoint"]
