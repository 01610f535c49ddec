"""``python -m mlx_onevision``: the same as the ``mlx-onevision`` command."""

from mlx_onevision.cli import main

if __name__ == "__main__":
    main()
