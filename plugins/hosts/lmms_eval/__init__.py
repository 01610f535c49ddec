# pyright: standard, reportMissingImports=false
"""A model of lmms-eval, with the settings under which LLaVA-OneVision's tables were made.

    python -m lmms_eval --model mlx_onevision --model_args pretrained=7b --tasks mme

``lmms_eval`` finds it by the entry point ``lmms_eval.models``; what it imports is imported when the
model is made.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

NAME = "mlx_onevision"


def manifest() -> "ModelManifest":
    """What lmms-eval registers. It is a model of the simple kind, as the reference's is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=NAME, simple_class_path="mlx_onevision.plugins.hosts.lmms_eval.model.OneVision"
    )
