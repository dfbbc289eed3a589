"""Stage 1: fuse LoRAs into a diffusion-transformer checkpoint and write a new one."""
