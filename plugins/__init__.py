"""What host applications plug into: the plugin contract's home, as ``mlx_onevision.plugins``."""
