"""The same checkpoint in every file layout: a folder in the Hub's original one goes in, and a
folder that holds the same network comes out.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

Weights = dict[str, np.ndarray]

TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def rename(weights: Weights, *rules: tuple[str, str]) -> Weights:
    """Every tensor under the name that the first rule (a pattern, its replacement) that matches
    gives it.
    """
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in rules:
            if re.match(pattern, name):
                name = re.sub(pattern, replacement, name, count=1)
                break
        renamed[name] = tensor
    assert len(renamed) == len(weights)
    return renamed


def to_sharded(hub: Path, folder: Path) -> Path:
    """Three shards and an index, as the published 7B and 72B folders have."""
    shutil.copytree(hub, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    index = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        shard = {name: weights[name] for name in names[number::3]}
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    size = sum(tensor.nbytes for tensor in weights.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    )
    return folder


def to_transformers_4_52(hub: Path, folder: Path) -> Path:
    """The names and keys that transformers 4.52 to 4.57 save, with the template in a file of its
    own.
    """
    shutil.copytree(hub, folder)
    weights = load_file(folder / "model.safetensors")
    rules = (
        (r"language_model\.model\.", "model.language_model."),
        (r"language_model\.lm_head\.", "lm_head."),
        (r"(?=vision_tower\.|multi_modal_projector\.|image_newline)", "model."),
    )
    save_file(rename(weights, *rules), folder / "model.safetensors", metadata={"format": "pt"})
    config = read_config(folder)
    text, vision = config["text_config"], config["vision_config"]
    text["layer_types"] = ["full_attention"] * text["num_hidden_layers"]
    text |= {"rope_scaling": None, "sliding_window": None}
    text.pop("_name_or_path")
    vision["torch_dtype"] = config["torch_dtype"]
    config |= {"multimodal_projector_bias": True, "transformers_version": "4.52.4"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _template_to_jinja(folder)
    return folder


def to_lmms_lab(hub: Path, folder: Path) -> Path:
    """The original repository's names and flat config.json, which has no file for the image
    processor; the tokenizer and the template stand beside it.

    The original names its tower instead of describing it, and there is no tiny one to name: the
    description stands beside the name.
    """
    folder.mkdir(parents=True)
    for name in (*TOKENIZER_FILES, "generation_config.json", "chat_template.json"):
        shutil.copy(hub / name, folder)
    weights = load_file(hub / "model.safetensors")
    rules = (
        (r"language_model\.model\.", "model."),
        (r"language_model\.lm_head\.", "lm_head."),
        (r"vision_tower\.", "model.vision_tower.vision_tower."),
        (r"multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
        (r"multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
        (r"image_newline", "model.image_newline"),
    )
    save_file(rename(weights, *rules), folder / "model.safetensors", metadata={"format": "pt"})
    config = read_config(hub)
    text, vision = config["text_config"], config["vision_config"]
    sides = round(len(config["image_grid_pinpoints"]) ** 0.5)
    text.pop("_name_or_path")
    flat = text | {
        "architectures": ["LlavaQwenForCausalLM"],
        "image_aspect_ratio": config["vision_aspect_ratio"],
        "image_crop_resolution": None,
        "image_grid_pinpoints": f"(1x1),...,({sides}x{sides})",
        "image_split_resolution": None,
        "image_token_index": config["image_token_index"],
        "mm_hidden_size": vision["hidden_size"],
        "mm_newline_position": "one_token",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_spatial_pool_mode": "bilinear",
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "mm_vision_tower_lr": 2e-06,
        "model_type": "llava",
        "pos_skipping_range": 4096,
        "rope_scaling": None,
        "tokenizer_model_max_length": 32768,
        "tokenizer_padding_side": "right",
        "torch_dtype": config["torch_dtype"],
        "transformers_version": "4.40.0.dev0",
        "use_mm_proj": True,
        "use_pos_skipping": False,
        "video_token_index": config["video_token_index"],
        "vision_config": vision,
        "vision_tower_pretrained": None,
    }
    (folder / "config.json").write_text(json.dumps(flat, indent=2))
    return folder


def to_half(hub: Path, folder: Path) -> Path:
    """float16 weights, as the published folders have."""
    shutil.copytree(hub, folder)
    weights = load_file(folder / "model.safetensors")
    half = {name: tensor.astype(np.float16) for name, tensor in weights.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    config = read_config(folder) | {"torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def with_head(hub: Path, folder: Path, copy: bool) -> Path:
    """A head beside the embedding that the configuration ties it to: a copy, or one of its own."""
    shutil.copytree(hub, folder)
    weights = load_file(folder / "model.safetensors")
    table = weights["language_model.model.embed_tokens.weight"]
    weights["language_model.lm_head.weight"] = table.copy() if copy else table[::-1].copy()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _template_to_jinja(folder: Path) -> None:
    old = folder / "chat_template.json"
    (folder / "chat_template.jinja").write_text(json.loads(old.read_text())["chat_template"])
    old.unlink()


Layout = Callable[[Path, Path], Path]
LAYOUTS: dict[str, Layout] = {
    "sharded": to_sharded,
    "transformers-4.52": to_transformers_4_52,
    "lmms-lab": to_lmms_lab,
}


def names(folder: Path) -> Iterable[str]:
    """The tensor names of a single-file folder."""
    return load_file(folder / "model.safetensors").keys()
