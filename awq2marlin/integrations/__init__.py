"""Loaders: what engines need to serve a converted checkpoint."""
