"""The Hugging Face Hub: names, repositories that are read, repositories that are written, errors in words."""
