"""``mlx-onevision``, and ``python -m mlx_onevision``: the commands of all packages in one group."""

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
