"""Checkpoint conversion between Hugging Face and Megatron, file to file, and verification."""
