"""Doors that put a backend behind a protocol of others."""
