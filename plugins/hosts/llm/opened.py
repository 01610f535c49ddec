"""The backends of this process: one for each model that was asked something, until its end."""

import atexit
import threading

from mlx_onevision.plugins.hosts.llm.registry import Entry
from mlx_onevision.plugins.interface import Backend
from mlx_onevision.plugins.service.media_policy import MediaPolicy

# It is the person's own command, or program: whatever that may read, this may.
POLICY = MediaPolicy.trusting()

GOODBYE_SECONDS = 2.0  # for what is under way at the end, such as a download

_backends: dict[tuple[str, str | None], Backend] = {}
_lock = threading.Lock()


def opened(entry: Entry) -> Backend:
    """A model's backend, the same one every time; it loads when it is first asked, and frees its
    memory after some minutes without a question.
    """
    key = entry.model, entry.revision
    with _lock:
        if key not in _backends:
            _backends[key] = _open(entry)
        return _backends[key]


def _open(entry: Entry) -> Backend:
    from mlx_onevision.plugins.adapters.engine import open_engine
    from mlx_onevision.plugins.service.service import Limits

    # Nobody else has to be protected, and the first question may have to wait for a download.
    limits = Limits(waiting=100_000, timeout=None, max_tokens=1 << 20)
    backend = open_engine(entry.model, revision=entry.revision, policy=POLICY, limits=limits)
    atexit.register(_close, backend)
    return backend


def _close(backend: Backend) -> None:
    closing = threading.Thread(target=backend.close, daemon=True)
    closing.start()
    closing.join(GOODBYE_SECONDS)
