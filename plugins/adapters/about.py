"""What is known of a model before its weights are read."""

from pathlib import Path

from mlx_onevision.plugins.contract.results import Capability, ModelInfo, Space


def model_info(model: str | Path, revision: str | None) -> ModelInfo:
    """Raises OneVisionError when the model cannot be found."""
    from mlx_onevision.checkpoint.hub import resolve
    from mlx_onevision.checkpoint.identity import identify
    from mlx_onevision.checkpoint.load import read_config
    from mlx_onevision.config.model import OneVisionConfig
    from mlx_onevision.embed.embedder import described
    from mlx_onevision.embed.embeddings import NOTES
    from mlx_onevision.sampling.grammar import available

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
