"""Requests, results, errors and streams of the plugin contract; hosts import ``interface``."""
