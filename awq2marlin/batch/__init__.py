"""Many conversions from one list, each with its own result."""
