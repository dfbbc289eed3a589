"""Names on the Hugging Face hub in place of paths: `owner/repo`, `hf://owner/repo/file.safetensors@revision`."""
