"""GGUF files: find and check them by their headers, and convert them to plain checkpoint folders."""
