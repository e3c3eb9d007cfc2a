"""Models written as GGUF files, which llama.cpp reads. Part of models."""
