"""Latents and text embeddings, made once and kept under their content's hash."""
