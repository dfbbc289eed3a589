"""with_diffusers.py BASE OUT SHARD_BYTES LORA...: fuse as diffusers' documentation does, on the CPU in bf16."""

import sys

import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

base, out, shard_bytes, *loras = sys.argv[1:]
transformer = QwenImageTransformer2DModel.from_pretrained(base, torch_dtype=torch.bfloat16)
pipeline = QwenImagePipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=transformer)
names = [f"lora{index}" for index in range(len(loras))]
for name, lora in zip(names, loras, strict=True):
    pipeline.load_lora_weights(lora, adapter_name=name)
pipeline.fuse_lora(adapter_names=names)
pipeline.unload_lora_weights()
transformer.save_pretrained(out, max_shard_size=int(shard_bytes))
