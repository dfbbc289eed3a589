"""The new LoRA: attached to the frozen base, written, proven to load, described."""
