"""Comparing two checkpoints value for value."""
