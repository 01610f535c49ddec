"""Write a trained demo model as a checkpoint folder, in the layout of the published ones.

    PYTHONPATH=. python -m examples.demo_model.export run/best.pt mlx_onevision/demo

The folder's README.md, the model card, stays as it is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from examples.demo_model.files import json_files
from examples.demo_model.network import OneVision
from examples.demo_model.sizes import Shape
from examples.demo_model.words import VOCABULARY, build_tokenizer, special_ids

MOST = 6_000_000  # bytes of the whole folder, which every user of the package downloads


def export(weights: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Write every file of the checkpoint; `weights` is a `OneVision.state_dict`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = json_files(special_ids(tokenizer), str(dtype).removeprefix("torch."))
    for file, content in names.items():
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")
    tensors = {key: value.detach().cpu().to(dtype).contiguous() for key, value in weights.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors makes a file that only its owner reads


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a trained demo model as a checkpoint.")
    parser.add_argument("weights", type=Path, help="best.pt; 'random' for weights from a seed")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    if str(args.weights) == "random":
        torch.manual_seed(0)
        weights = OneVision(Shape(VOCABULARY)).state_dict()
    else:
        weights = torch.load(args.weights, map_location="cpu")["model"]
    export(weights, args.folder, getattr(torch, args.dtype))
    size = sum(path.stat().st_size for path in args.folder.iterdir())
    print(f"{args.folder}: {size:,} bytes")
    if size > MOST and args.dtype != "float32":
        raise SystemExit(f"that is more than the {MOST:,} that the package has room for")


if __name__ == "__main__":
    main()
