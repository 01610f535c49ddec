"""Checkpoints: finding and downloading them, checking their files, loading, adapting, planning."""
