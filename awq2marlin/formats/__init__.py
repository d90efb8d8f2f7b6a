"""Checkpoint formats: one file each, and the registry that recognises them."""
