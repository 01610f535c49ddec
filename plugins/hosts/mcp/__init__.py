"""``mlx-onevision mcp``: any backend behind the Model Context Protocol, on stdin and stdout."""
