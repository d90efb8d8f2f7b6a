"""The Hugging Face Hub: names, repositories to read, repositories to write, error messages."""
