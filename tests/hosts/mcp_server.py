"""The MCP server over the fake backend, as a program: the tests start it as a host does.

python mcp_server.py '{"settings": {…}, "fake": {…}, "folders": […], "print": true}'
"""

import json
import sys

from mlx_onevision.plugins.hosts.mcp import pipes

taken = pipes.take()

from mlx_onevision.plugins.fake import FakeBackend  # noqa: E402
from mlx_onevision.plugins.hosts.mcp.serving import serve  # noqa: E402
from mlx_onevision.plugins.hosts.mcp.settings import McpSettings  # noqa: E402
from mlx_onevision.plugins.policy import MediaPolicy  # noqa: E402
from mlx_onevision.plugins.service import Limits  # noqa: E402

asked = json.loads(sys.argv[1]) if sys.argv[1:] else {}
policy = MediaPolicy(folders=asked.get("folders", []))
backend = FakeBackend(policy=policy, limits=Limits(timeout=None), **asked.get("fake", {}))
serve(backend, taken, McpSettings(policy, **asked.get("settings", {})))
