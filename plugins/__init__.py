"""What host applications plug into. ``interface`` is the contract; ``open_backend`` opens what is
behind it.
"""

from mlx_onevision.plugins.discovery import backends, open_backend

__all__ = ["backends", "open_backend"]
