"""Vectors of images, videos and texts."""
