"""Checkpoints in, checkpoints out: the converter's home, installed as ``mlx_onevision.convert``."""
