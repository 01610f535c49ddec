"""Streaming: however large a model is, no more of it is in memory than a module."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from changed_checkpoints import write_hollow
from checkpoints import Sizes

SHARDS = 40
# One layer a shard: 5.2 million values of bfloat16.
SIZES = Sizes(layers=SHARDS, hidden=768, intermediate=1536, heads=12, kv_heads=12, vocab=1024)

PROGRAM = """
import json, resource, sys
from pathlib import Path
job = json.loads(sys.argv[1])
import mlx.core as mx
from mlx_onevision.checkpoint import recipes
from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.convert.conversion import convert
recipe = recipes.uniform(job["bits"]) if job["bits"] else None
if job["limit"]:
    resource.setrlimit(resource.RLIMIT_DATA, (job["limit"], job["limit"]))
if job["target"]:
    convert(job["source"], job["target"], recipe=recipe, shard_bytes=job["shard"])
else:
    model = load_checkpoint(Path(job["source"]), recipe=recipe).model
    mx.eval(model.parameters())
status = Path("/proc/self/status")
if status.exists():  # where ru_maxrss begins with what the process that started this one had
    peak = int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"rss": peak, "mlx": mx.get_peak_memory()}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hollow(tmp_path_factory.mktemp("large") / "source", SIZES, SHARDS)


def run(source: Path, target: Path | None, bits: int | None, **job: Any) -> dict[str, int]:
    given = {"source": str(source), "target": str(target) if target else None, "bits": bits}
    given |= {"limit": 0, "shard": 5 << 30, **job}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(given)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def sizes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in folder.glob("*.safetensors")]


def test_converting_40_shards_holds_less_than_two(source: Path, tmp_path: Path) -> None:
    """The peak of the whole process, in bytes, under a limit on its memory that would end it; what
    MLX ever held of the weights is less than one shard.
    """
    shard = max(sizes(source))
    assert len(sizes(source)) == SHARDS and sum(sizes(source)) > 2 * shard + 350 * 10**6
    limit = 2 * shard + 300 * 10**6
    used = run(source, tmp_path / "made", 4, limit=limit if sys.platform == "linux" else 0)
    assert used["rss"] < limit
    assert used["mlx"] < shard
    assert 0.2 < sum(sizes(tmp_path / "made")) / sum(sizes(source)) < 0.4


def test_packing_while_loading_never_holds_the_whole(source: Path) -> None:
    packed = sum(sizes(source)) * 4.5 / 16
    used = run(source, None, 4)
    assert packed * 0.9 < used["mlx"] < packed * 1.1 + max(sizes(source))


def test_the_whole_would_not_fit(source: Path) -> None:
    """What the limit above is worth: a program that reads all the weights is beyond it."""
    used = run(source, None, None)
    assert used["rss"] > used["mlx"] > 2 * max(sizes(source)) + 300 * 10**6
