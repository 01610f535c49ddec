"""``mlx-onevision``, and ``python -m mlx_onevision``: the commands of all packages in one group."""

from mlx_onevision.cli.main import cli, main

for name, package, text in (
    ("convert", "convert", "Write a model in MLX's layout, smaller if you like."),
    ("mcp", "plugins.hosts.mcp", "Serve a model over MCP, to Claude Desktop and other hosts."),
    ("serve", "plugins.hosts.http", "Serve a model over HTTP, as OpenAI's clients speak it."),
):
    cli.announce(name, f"mlx_onevision.{package}.command", text)

if __name__ == "__main__":
    main()
