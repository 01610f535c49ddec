"""``mlx-onevision``, and ``python -m mlx_onevision``: the commands, put together.

The doors do not know each other, so this is the one place that knows them all.
"""

from mlx_onevision.cli.main import cli, main
from mlx_onevision.cli.options import debug_option
from mlx_onevision.convert.command import convert
from mlx_onevision.plugins.hosts.http.command import serve
from mlx_onevision.plugins.hosts.mcp.command import mcp

for command in (convert, mcp, serve):
    debug_option(command)
    cli.add_command(command)

if __name__ == "__main__":
    main()
