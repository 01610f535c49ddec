"""A checkpoint's configuration files, read and checked."""
