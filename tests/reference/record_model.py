"""Records a tiny random checkpoint, and what transformers computes with it, into model/.

    python tests/reference/record_model.py        (in the environment of ``make parity``)

The default tests hold this package to these numbers where torch is not installed. Nothing here
depends on the machine but the last bits of float32 sums.

For each conversation of ``parity.cases.recorded_conversations`` model/stages.npz has, under the
conversation's name and a slash:

    ids        int32 (L,)
    prompt     the rendered prompt
    sizes      int32 (images, 2), height and width
    pixels     SHA-256 of the pixel values, float32 (tiles, 3, S, S) in C order, as hex digits
    tower      float32 (2, patches, width): the selected hidden states of the first and last tile
    projected  float32 (2, patches, D), of the same tiles
    packed     float32 (rows, D), all images one after another
    logits     float32 (8, vocabulary), at positions spread evenly from the first to the last
    tokens     int32 (up to 32,), greedy
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from parity.cases import recorded_conversations  # noqa: E402
from parity.checkpoints import Tiny, write_checkpoint  # noqa: E402
from parity.oracle import VERSIONS, Oracle  # noqa: E402

CHECKPOINT = Tiny(
    seed=5,
    v_hidden=32,
    v_layers=2,
    v_heads=2,
    v_inter=72,
    hidden=32,
    heads=4,
    kv_heads=2,
    inter=80,
    template="newline",
)


def logit_rows(length: int) -> np.ndarray:
    """The positions whose logits are recorded."""
    return np.linspace(0, length - 1, 8).round().astype(int)


def main() -> None:
    folder = HERE / "model"
    shutil.rmtree(folder, ignore_errors=True)
    write_checkpoint(folder, CHECKPOINT)
    oracle = Oracle(folder)
    arrays: dict[str, np.ndarray] = {}
    for name, messages in recorded_conversations().items():
        stages = oracle.run(messages, tokens=32)
        if min(stages.margins) < 1e-3:
            raise SystemExit(f"{name}: a greedy choice is too close; take another seed")
        values = {
            "ids": stages.ids.astype(np.int32),
            "prompt": np.array(oracle.render(messages)),
            "logits": stages.logits[logit_rows(len(stages.ids))],
            "tokens": np.array(stages.tokens, np.int32),
        }
        if stages.sizes:
            values |= {
                "sizes": np.array(stages.sizes, np.int32),
                "pixels": np.array(hashlib.sha256(stages.tiles.tobytes()).hexdigest()),
                "tower": stages.tower[[0, -1]],
                "projected": stages.projected[[0, -1]],
                "packed": np.concatenate(stages.packed),
            }
        arrays |= {f"{name}/{stage}": value for stage, value in values.items()}
        print(name, len(stages.ids), len(set(stages.tokens)), f"{min(stages.margins):.4f}")
    np.savez_compressed(folder / "stages.npz", allow_pickle=False, **arrays)
    (folder / "recorded_with.json").write_text(json.dumps(VERSIONS, indent=2) + "\n")


if __name__ == "__main__":
    main()
