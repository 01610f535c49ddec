"""The MCP server over the fake backend, as a program: the tests start it as a host does.

python mcp_server.py '{"settings": {}, "fake": {}, "folders": [], "noisy": true}'
"""

from mlx_onevision.plugins.hosts.mcp import pipes

taken = pipes.take_stdio()

import ctypes  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402

from mlx_onevision.plugins.adapters.fake import FakeBackend  # noqa: E402
from mlx_onevision.plugins.hosts.mcp.allowed_files import McpSettings  # noqa: E402
from mlx_onevision.plugins.hosts.mcp.server import serve  # noqa: E402
from mlx_onevision.plugins.interface import (  # noqa: E402
    EventStream,
    GenerateRequest,
    GenerateResult,
)
from mlx_onevision.plugins.service.media_policy import MediaPolicy  # noqa: E402
from mlx_onevision.plugins.service.service import Limits  # noqa: E402


class Noisy(FakeBackend):
    """What it calls prints, as libraries do."""

    def generate(self, request: GenerateRequest) -> EventStream[GenerateResult]:
        print("noise of Python", flush=True)
        os.write(1, b"noise of a descriptor\n")
        library = ctypes.CDLL(None)
        library.puts(b"noise of C")
        library.fflush(None)
        subprocess.run(["echo", "noise of a child"])
        return super().generate(request)


asked = json.loads(sys.argv[1]) if sys.argv[1:] else {}
policy = MediaPolicy(folders=asked.get("folders", []))
kind = Noisy if asked.get("noisy") else FakeBackend
backend = kind(policy=policy, limits=Limits(timeout=None), **asked.get("fake", {}))
serve(backend, taken, McpSettings(policy, **asked.get("settings", {})))
