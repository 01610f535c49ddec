"""What holds for every test: nothing of the user's is read, nothing outside is reached.

Set before any library is imported, because huggingface_hub reads its environment at import.
"""

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from mlx_onevision.api import Model

_home = tempfile.TemporaryDirectory(prefix="mlx-onevision-tests-")
for _name in [name for name in os.environ if name.startswith("HF_")]:
    del os.environ[_name]
os.environ["HF_HOME"] = _home.name
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # a closed port
# Float32 is float32: a GPU that rounds its products to TF32 would miss the bounds of the tests.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

LONGEST = (  # seconds, the most first
    "tests/engine/test_predicted_memory.py",
    "tests/hostile/test_soak.py",
    "tests/hostile/test_raw_http.py",
    "tests/engine/test_ranks.py",
    "tests/plugins/http/test_ranks.py",
    "tests/demo/test_demo_model.py",
    "tests/train/test_loop.py",
    "tests/cli/test_sharing.py",
    "tests/media/test_hostile_videos.py",
    "tests/media/test_video.py",
    "tests/describe/test_stream.py",
    "tests/convert/test_verify.py",
    "tests/convert/test_loss.py",
    "tests/test_examples.py",
    "tests/test_commands.py",
)

# In the background Ctrl-C is ignored, and a test that presses it would wait for a full run to end.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every time, and no deadline: a shared machine has slow moments.
settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest start first: one that starts last leaves a process alone with it.

    ``--no-loadscope-reorder`` has xdist keep this order, in which it hands out whole files.
    """
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: looking for cycles leaves them out, 0.3 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _random_numbers() -> None:
    """The same every time, whichever tests ran before."""
    import mlx.core as mx

    mx.random.seed(0)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint; it is only read."""
    from checkpoints import write

    return write(tmp_path_factory.mktemp("checkpoint") / "tiny", tied=False)


@pytest.fixture(scope="module")
def model(folder: Path) -> "Iterator[Model]":
    """The checkpoint, loaded for the tests of one file."""
    from mlx_onevision.api import load

    model = load(folder)
    yield model
    model.close()
