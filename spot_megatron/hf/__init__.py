"""Hugging Face model folders: config, tensors, side files and the weight map."""
