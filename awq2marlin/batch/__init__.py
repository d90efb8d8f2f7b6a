"""Many conversions from one list."""
