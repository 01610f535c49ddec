"""Everything beside the weights: config.json for any reader, and what prepares a prompt."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_onevision.checkpoint.hub import SIDECARS
from mlx_onevision.checkpoint.load import OpenedCheckpoint
from mlx_onevision.checkpoint.plan import ConversionPlan
from mlx_onevision.config import original_layout
from mlx_onevision.config.model import HUB_TYPE, OneVisionConfig
from mlx_onevision.config.preprocessor import ImageConfig
from mlx_onevision.convert.hub import Source
from mlx_onevision.errors import CheckpointError
from mlx_onevision.files import read_json
from mlx_onevision.prompt.chat_template import ChatTemplate
from mlx_onevision.prompt.tokenizer import TOKENIZER_BYTES

TEXT_FIELDS = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads hidden_act max_position_embeddings rms_norm_eps
""".split()
DROPPED = ("_name_or_path", "torch_dtype", "quantization", "quantization_config", "auto_map")


def config_json(
    opened: OpenedCheckpoint, plan: ConversionPlan, source: Source, version: str, recipe: str
) -> bytes:
    """The config.json of what ``plan`` makes, in the Hub's layout.

    Defaults are written out, because other readers have other ones; the source's further keys stay.

    Raises:
        CheckpointError: when it would not be read back as the model that was made.
    """
    values = dict(opened.values)
    config, text, vision = plan.config, plan.config.text_config, plan.config.vision_config
    # A folder's path is nobody's business, its name may be.
    origin = {"version": version, "recipe": recipe, "base_model": source.base}
    origin |= {"revision": source.commit}
    if original_layout.is_original(values):
        values = original_layout.to_hub(values, config.model_type)
        values["architectures"] = ["LlavaOnevisionForConditionalGeneration"]
    values = _kept(values)
    settings = (*original_layout.CHOICES, *original_layout.FLAGS)
    values = {key: value for key, value in values.items() if key not in settings}
    if config.model_type != HUB_TYPE:
        values |= {key: getattr(config, key) for key in settings}
    values |= {
        "model_type": config.model_type,
        "text_config": {
            **_kept(values.get("text_config")),
            **{key: getattr(text, key) for key in TEXT_FIELDS},
            "model_type": "qwen2",
            "rope_theta": text.rope.rope_theta,
            "tie_word_embeddings": config.tie_word_embeddings,
        },
        "vision_config": {
            **_kept(values.get("vision_config")),
            **dataclasses.asdict(vision),
            "model_type": "siglip_vision_model",
        },
        "image_token_index": config.image_token_index,
        "video_token_index": config.video_token_index,
        "image_grid_pinpoints": [list(pair) for pair in config.image_grid_pinpoints],
        "vision_aspect_ratio": config.vision_aspect_ratio,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": plan.dtype,
        "mlx_onevision": {key: value for key, value in origin.items() if value is not None},
    }
    values["text_config"].pop("dtype", None)
    values.pop("dtype", None)
    if config.quantization is not None:
        # As MLX converters write it: a default, and the modules that differ from it.
        quantization = dataclasses.asdict(config.quantization.default) | {
            name: False if spec is None else dataclasses.asdict(spec)
            for name, spec in sorted(config.quantization.modules.items())
        }
        values |= {"quantization": quantization, "quantization_config": quantization}
    written = json.loads(json.dumps(values, allow_nan=False))
    if OneVisionConfig.from_dict(written) != config:
        raise CheckpointError("config.json has settings that the converted one would lose")
    return _json(dict(sorted(values.items())))


def _kept(values: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (values or {}).items() if key not in DROPPED}


def processor_files(opened: OpenedCheckpoint) -> dict[str, bytes]:
    """The files that prepare prompts and images, those that the source lacks made for it.
    Raises CheckpointError for one that cannot be read.
    """
    folder, config = opened.folder, opened.config
    licenses = sorted(path.name for path in folder.glob("LICENSE*"))
    files = {name: _read(folder / name) for name in (*SIDECARS, *licenses)}
    found = {name: data for name, data in files.items() if data is not None}
    if "chat_template.json" not in found and "chat_template.jinja" not in found:
        found["chat_template.jinja"] = ChatTemplate.from_folder(folder).source.encode()
    if "preprocessor_config.json" not in found:
        image = ImageConfig.from_dict(None, config)
        pixels = {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(image.image_mean),
            "image_std": list(image.image_std),
            "processor_class": "LlavaOnevisionProcessor",
            "resample": 3,
            "rescale_factor": image.rescale_factor,
            "size": {"height": image.size, "width": image.size},
        }
        tiles = {
            "do_pad": True,
            "image_grid_pinpoints": [list(pair) for pair in image.image_grid_pinpoints],
            "image_processor_type": "LlavaOnevisionImageProcessor",
        }
        frames = {"video_processor_type": "LlavaOnevisionVideoProcessor"}
        found["preprocessor_config.json"] = _json(pixels | tiles)
        found.setdefault("video_preprocessor_config.json", _json(pixels | frames))
    if "processor_config.json" not in found:
        found["processor_config.json"] = _json(
            {
                "processor_class": "LlavaOnevisionProcessor",
                "image_token": "<image>",
                "video_token": "<video>",
                "num_image_tokens": config.tokens_per_tile,
                "vision_feature_select_strategy": "full",
                "vision_aspect_ratio": config.vision_aspect_ratio,
            }
        )
    if "tokenizer.json" in found:
        found["tokenizer.json"] = _with_placeholders(found["tokenizer.json"], folder, config)
    return found


def _with_placeholders(tokenizer: bytes, folder: Path, config: OneVisionConfig) -> bytes:
    """The tokenizer with the placeholders that original checkpoints lack and others need."""
    from tokenizers import Tokenizer

    if not original_layout.is_original(read_json(folder / "config.json") or {}):
        return tokenizer
    wanted = {"<image>": config.image_token_index, "<video>": config.video_token_index}
    known = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lacking = {token: index for token, index in wanted.items() if known.token_to_id(token) is None}
    values = read_json(folder / "tokenizer.json", TOKENIZER_BYTES) or {}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    values["added_tokens"] = [
        *(values.get("added_tokens") or []),
        *(
            {"id": index, "content": token, **flags, "special": True}
            for token, index in sorted(lacking.items(), key=lambda item: item[1])
        ),
    ]
    text = json.dumps(values, ensure_ascii=False, indent=2)
    made = Tokenizer.from_str(text)  # which counts on from the last token, whatever the id
    right = all(made.token_to_id(token) == index for token, index in wanted.items())
    return text.encode() if lacking and right else tokenizer


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _read(path: Path) -> bytes | None:
    try:
        if path.stat().st_size > TOKENIZER_BYTES:
            raise CheckpointError(f"{path.name} is larger than {TOKENIZER_BYTES} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from None
