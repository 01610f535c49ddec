"""mlx-vlm, in a process of its own: it sets things up for the whole process when it is imported."""

# pyright: reportMissingImports=false
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PROGRAM = """
import json, sys
from parity import torchvision_ops
from PIL import Image
from mlx_vlm.generate import generate_step
from mlx_vlm.utils import load
import mlx.core as mx
job = json.loads(sys.argv[1])
model, processor = load(job["folder"])
answers = []
for prompt, picture in zip(job["prompts"], job["pictures"], strict=True):
    with Image.open(picture) as image:
        inputs = processor(text=[prompt], images=[image.convert("RGB")], return_tensors="np")
    ids = mx.array(inputs["input_ids"])
    steps = generate_step(
        ids, model, mx.array(inputs["pixel_values"]), None,
        image_sizes=inputs["image_sizes"], max_tokens=job["tokens"], temperature=0.0,
    )
    answers.append({"ids": ids[0].tolist(), "tokens": [int(token) for token, _ in steps]})
print("ANSWERS" + json.dumps(answers))
"""


def ask_mlx_vlm(
    folder: Path, prompts: Sequence[str], pictures: Sequence[Path], tokens: int
) -> list[dict[str, list[int]]]:
    """The prompt's ids and the greedy tokens for each prompt, which has one image."""
    job = {
        "folder": str(folder),
        "prompts": list(prompts),
        "pictures": [str(picture) for picture in pictures],
        "tokens": tokens,
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(job)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.partition("ANSWERS")[2])
