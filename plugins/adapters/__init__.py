"""Backends that are elsewhere: the contract over somebody's wire."""
