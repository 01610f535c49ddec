"""The `mlx-onevision` command: a module a command, and what several of them share."""
