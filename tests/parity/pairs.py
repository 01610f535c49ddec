"""Checkpoint folders, and both implementations' models of them, each made once."""

from collections.abc import Callable
from pathlib import Path

from parity.checkpoints import Tiny, write_checkpoint
from parity.oracle import Oracle
from parity.ours import Ours


class Checkpoints:
    """Folders by what they hold, and both implementations' models of a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders: dict[str, Path] = {}
        self._ours: dict[Path, Ours] = {}
        self._oracles: dict[Path, Oracle] = {}

    def hub(self, tiny: Tiny) -> Path:
        """A folder in the Hub's original layout."""
        return self.made(repr(tiny), lambda folder: write_checkpoint(folder, tiny))

    def made(self, key: str, make: Callable[[Path], Path]) -> Path:
        """The folder that ``make`` wrote, the first time, for this key."""
        if key not in self._folders:
            self._folders[key] = make(self.root / str(len(self._folders)))
        return self._folders[key]

    def pair(self, tiny: Tiny) -> tuple[Ours, Oracle]:
        """Both implementations' model of one checkpoint."""
        folder = self.hub(tiny)
        return self.ours(folder), self.oracle(folder)

    def ours(self, folder: Path) -> Ours:
        if folder not in self._ours:
            self._ours[folder] = Ours(folder)
        return self._ours[folder]

    def oracle(self, folder: Path) -> Oracle:
        if folder not in self._oracles:
            self._oracles[folder] = Oracle(folder)
        return self._oracles[folder]

    def close(self) -> None:
        for ours in self._ours.values():
            ours.close()
