"""Live parity: what this package computes, held against transformers.

Needs torch, transformers, torchvision and mlx-vlm, which only ``make parity`` installs. Checkpoints
are tiny, random and written on the spot; loaded models are kept for the whole run.
"""

# pyright: reportMissingImports=false
from collections.abc import Iterator

import pytest
import torch
from parity import compare
from parity.oracle import VERSIONS
from parity.pairs import Checkpoints

torch.set_num_threads(1)  # the networks are too small to share out


def pytest_report_header() -> str:
    return "reference: " + ", ".join(f"{name} {version}" for name, version in VERSIONS.items())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The reference's own warnings are not this package's errors."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore::Warning:(torch|transformers|peft)"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoints]:
    made = Checkpoints(tmp_path_factory.mktemp("checkpoints"))
    yield made
    made.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures behind the green dots."""
    terminalreporter.section("largest differences from transformers")
    for stage, largest in compare.worst.items():
        terminalreporter.line(f"{stage:<14} {largest:.1e} in {compare.counts[stage]} comparisons")
    terminalreporter.line(f"greedy tokens  {compare.counts['greedy tokens']} compared, all equal")
