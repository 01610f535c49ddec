"""Addresses and paths that nobody may have read for them, and what sees whether they are."""

import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx_onevision

# Where code and its data are read from, whatever is asked.
OWN = tuple(
    os.path.realpath(place)
    for place in (*sysconfig.get_paths().values(), Path(mlx_onevision.__file__).parents[1])
)


class Watch:
    """What this process connects to, looks up and opens."""

    def __init__(self) -> None:
        self.port = 0  # of the server that is asked
        self.active = False
        self.events: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            path = arguments[0]
            if isinstance(path, str | bytes) and not os.path.realpath(os.fsdecode(path)).startswith(
                (*OWN, "/proc/", "/dev/null")
            ):
                self.events.append(f"open {path!r}")
        elif event == "socket.connect" and self.port not in arguments[1]:
            self.events.append(f"connect {arguments[1]!r}")
        elif event == "socket.getaddrinfo" and arguments[1] != self.port:
            self.events.append(f"look up {arguments[0]!r}")

    @contextmanager
    def watching(self, port: int = 0) -> Iterator[list[str]]:
        self.events, self.port, self.active = [], port, True
        try:
            yield self.events
        finally:
            self.active = False


def hostile(port: int) -> list[str]:
    """Addresses that mean this machine, a file, or nothing, in every dress."""
    hosts = [
        "127.0.0.1", "localhost", "LOCALHOST", "127.1", "0", "0.0.0.0", "2130706433", "0x7f000001",
        "0177.0.0.1", "127.0.0.1.", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]",
        "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "169.254.169.254", "10.0.0.1", "192.168.0.1",
        "172.16.0.1", "100.64.0.1", "[fe80::1]", "[fc00::1]", "224.0.0.1", "255.255.255.255",
        "allowed.test@127.0.0.1", "127.0.0.1#@allowed.test", "allowed.test\\@127.0.0.1",
        "allowed.test.127.0.0.1", "allowed.test:80@127.0.0.1", "%31%32%37.0.0.1", "１２７.0.0.1",
    ]  # fmt: skip
    addresses = [f"{scheme}://{host}:{port}/" for scheme in ("http", "https") for host in hosts]
    addresses += [f"http://{host}/" for host in hosts]
    return [
        *addresses,
        f"http:\\\\127.0.0.1:{port}/",
        f"http:/127.0.0.1:{port}/",
        f"//127.0.0.1:{port}/",
        f"http://127.0.0.1:{port}\r\nHost: allowed.test/",
        f"http://allowed.test/ 127.0.0.1:{port}",
        f"ftp://127.0.0.1:{port}/",
        f"gopher://127.0.0.1:{port}/",
        f"concat:http://127.0.0.1:{port}/|a",
        f"subfile,,start,0,end,9,,:http://127.0.0.1:{port}/",
        "file:///etc/passwd",
        "file:/etc/passwd",
        "FILE:///etc/passwd",
        "/etc/passwd",
        "http://",
        "http://:80/",
        "http://[::1",
        "http://allowed.test:99999/",
        "javascript:alert(1)",
        "\x00http://allowed.test/",
        "http://allowed.test\x00.example/",
    ]


def corpus(port: int, album: Path) -> list[str]:
    """These, and paths around a folder that may be read, ``album``."""
    paths = [
        f"{album.parent}/secret.png", f"{album}/../secret.png", f"{album}/link.png",
        f"{album}/away/secret.png", f"{album}/pipe", f"{album}/nothing.png", "/etc/passwd",
        "/dev/zero", "/dev/stdin", "/proc/self/environ", "//etc/passwd", "~/.ssh/id_rsa", "~root",
        "../secret.png", "a.png", "-", ".", "/", "\0", f"{album}/a.png\0.png", "C:\\a.png",
        "\\\\host\\share\\a.png", "file://localhost/etc/passwd", "file://[", "file:///\0",
        "x" * 5000,
    ]  # fmt: skip
    return [*hostile(port), *paths]
