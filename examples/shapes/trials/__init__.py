"""The comparison behind docs/few-step.md: how a LoRA trained on a few-step base keeps what the base could do."""
