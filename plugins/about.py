"""What is known of a model before its weights are read."""

from pathlib import Path

from mlx_onevision.plugins.results import Capability, ModelInfo, Space


def model_info(model: str | Path, revision: str | None) -> ModelInfo:
    """Raises OneVisionError when the model cannot be found."""
    from mlx_onevision.checkpoint import read_config
    from mlx_onevision.config import OneVisionConfig
    from mlx_onevision.embedding import described
    from mlx_onevision.grammar import available
    from mlx_onevision.hub import resolve
    from mlx_onevision.identity import identify
    from mlx_onevision.vectors import NOTES

    folder = resolve(model, revision=revision)
    config = OneVisionConfig.from_dict(read_config(folder))
    name, commit = identify(folder)
    capabilities: list[Capability] = ["generate", "embed", "describe_video", "images", "videos"]
    capabilities.append("logprobs")
    if available():
        capabilities.append("json_schema")
    wide = config.vision_config.hidden_size * len(config.feature_layers)
    return ModelInfo(
        id=name,
        revision=commit,
        context=config.text_config.max_position_embeddings,
        quantization=described(config.quantization),
        capabilities=tuple(capabilities),
        spaces=(
            Space("vision", wide, ("image", "video"), trained=False, note=NOTES["vision"]),
            Space(
                "joint",
                config.text_config.hidden_size,
                ("text", "image", "video"),
                trained=False,
                note=NOTES["joint"],
            ),
        ),
    )
