"""Train a new LoRA on a fused diffusion-transformer checkpoint."""
