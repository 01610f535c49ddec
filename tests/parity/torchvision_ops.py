"""Makes torchvision importable beside a CPU-only torch; import this module before transformers.

Wheels of torchvision are built for a CUDA torch: their extension does not load beside the CPU one,
and the import then stops at two operators that it would have registered. Declaring them is enough,
since image processing uses neither. Where the wheel does match, nothing is declared.
"""

# pyright: reportMissingImports=false
import torch

OPERATORS = ("nms", "qnms")
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _declare() -> object:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in OPERATORS:
        library.define(name + SIGNATURE)
    return library


try:
    import torchvision
except RuntimeError:
    LIBRARY = _declare()  # kept: the declarations go with it
    import torchvision

__all__ = ["torchvision"]
