"""The demo model, changed so that it does not know how to end an answer: a long one is long."""

import json
import shutil
from pathlib import Path

from mlx_onevision.checkpoint.hub import EMBEDDED


def endless(folder: Path) -> Path:
    """Makes its folder, which must not exist."""
    shutil.copytree(EMBEDDED, folder)
    settings = folder / "generation_config.json"
    values = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps({**values, "eos_token_id": [0]}), encoding="utf-8")
    return folder
