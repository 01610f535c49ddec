"""Write a trained demo model as a checkpoint folder, in the layout of the published ones.

PYTHONPATH=. python -m examples.demo_model.export run/best.pt mlx_onevision/demo
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from examples.demo_model import words
from examples.demo_model.network import PATCH, OneVision, Shape
from examples.demo_model.packing import GRIDS, MAX_TILES, TILE, TOKENS

CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{# Render all video then #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
    "{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def model_config(shape: Shape, ids: dict[str, int], dtype: str) -> dict[str, Any]:
    """config.json, as the published checkpoints write it."""
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_grid_pinpoints": [list(grid) for grid in GRIDS],
        "image_token_index": ids[words.IMAGE],
        "video_token_index": ids[words.VIDEO],
        "projector_hidden_act": "gelu",
        "vision_aspect_ratio": f"anyres_max_{MAX_TILES}",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "use_image_newline_parameter": True,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "text_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "bos_token_id": ids[words.END_OF_TEXT],
            "eos_token_id": ids[words.END],
            "hidden_act": "silu",
            "hidden_size": shape.text,
            "intermediate_size": shape.text_inner,
            "max_position_embeddings": 4096,
            "num_attention_heads": shape.heads,
            "num_hidden_layers": shape.text_layers,
            "num_key_value_heads": shape.kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_theta": shape.rope_theta,
            "tie_word_embeddings": True,
            "torch_dtype": dtype,
            "use_sliding_window": False,
            "vocab_size": shape.vocabulary,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": shape.vision,
            "image_size": TILE,
            "intermediate_size": shape.vision_inner,
            "layer_norm_eps": 1e-6,
            "num_attention_heads": shape.vision_heads,
            "num_channels": 3,
            "num_hidden_layers": shape.vision_layers,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
    }


def other_files(ids: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Every other JSON file of a published checkpoint, by name."""
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
        "size": {"height": TILE, "width": TILE},
    }
    special = {
        str(ids[text]): {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for text in words.SPECIAL
    }
    return {
        "generation_config.json": {
            "bos_token_id": ids[words.END_OF_TEXT],
            "eos_token_id": ids[words.END],
            "pad_token_id": ids[words.END_OF_TEXT],
        },
        "preprocessor_config.json": steps
        | {
            "do_pad": True,
            "image_grid_pinpoints": [list(grid) for grid in GRIDS],
            "image_processor_type": "LlavaOnevisionImageProcessor",
        },
        "video_preprocessor_config.json": steps
        | {"video_processor_type": "LlavaOnevisionVideoProcessor"},
        "processor_config.json": {
            "image_token": words.IMAGE,
            "num_image_tokens": TOKENS,
            "processor_class": "LlavaOnevisionProcessor",
            "video_token": words.VIDEO,
            "vision_aspect_ratio": f"anyres_max_{MAX_TILES}",
            "vision_feature_select_strategy": "full",
        },
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": special,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": words.END,
            "errors": "replace",
            "model_max_length": 4096,
            "pad_token": words.END_OF_TEXT,
            "processor_class": "LlavaOnevisionProcessor",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }


def export(weights: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Write every file of the checkpoint; `weights` is a `OneVision.state_dict`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = words.build_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {text: tokenizer.token_to_id(text) for text in words.SPECIAL}
    name = str(dtype).removeprefix("torch.")
    files = other_files(ids) | {"config.json": model_config(Shape(words.VOCABULARY), ids, name)}
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")
    tensors = {key: value.detach().cpu().to(dtype).contiguous() for key, value in weights.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a trained demo model as a checkpoint.")
    parser.add_argument("weights", type=Path, help="best.pt; 'random' for weights from a seed")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    if str(args.weights) == "random":
        torch.manual_seed(0)
        weights = OneVision(Shape(words.VOCABULARY)).state_dict()
    else:
        weights = torch.load(args.weights, map_location="cpu")["model"]
    export(weights, args.folder, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
