"""Descriptions of videos: scenes, captions, chapters and a summary, and their file formats."""
