"""Bytes: folders read with suspicion, files streamed and hashed, headers, threads. Knows no checkpoint format."""
