"""Callbacks of this project: one a file, with its YAML in configs/callbacks/."""
