"""What a conversion costs in quality, measured against the source model."""
