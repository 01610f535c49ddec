"""What is seen of the connections between ranks."""

import json
import socket
from pathlib import Path

import pytest

from mlx_onevision.distributed import Links


@pytest.mark.parametrize("pending", [b"", b"of a sum that nobody waits for any more"])
def test_a_rank_that_has_ended_is_noticed_whatever_it_sent_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pending: bytes
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        hosts = tmp_path / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"]]))
        monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
        with socket.create_connection(("127.0.0.1", port)):
            links = Links()
            other, _ = listening.accept()  # only now, so that its end is not among the links
            other.sendall(pending)
            assert not links.lost()
            other.close()
            assert links.lost()
    for connection in links.sockets:
        connection.close()
