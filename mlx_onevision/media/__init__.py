"""Images and videos: from sources to frames and tiles."""
