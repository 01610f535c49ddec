"""The JSON files of the demo checkpoint, as the published checkpoints on the hub have them."""

from __future__ import annotations

from typing import Any

from examples.demo_model import words
from examples.demo_model.packing import GRIDS, MAX_TILES, PATCH, TILE, TOKENS
from examples.demo_model.sizes import Shape

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


def _model_config(shape: Shape, ids: dict[str, int], dtype: str) -> dict[str, Any]:
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


def _other_files(ids: dict[str, int]) -> dict[str, dict[str, Any]]:
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


def json_files(ids: dict[str, int], dtype: str) -> dict[str, dict[str, Any]]:
    """Every JSON file but the tokenizer, by name.

    ids : of the special tokens; dtype : of the weights, as torch calls it.
    """
    config = _model_config(Shape(words.VOCABULARY), ids, dtype)
    return _other_files(ids) | {"config.json": config}
