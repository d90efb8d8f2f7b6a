"""Loaders for the engines people use; each imported only by its engine or its user."""
