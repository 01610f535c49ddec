"""Hosts: a backend behind HTTP, MCP, or the plugin interface of another program."""
