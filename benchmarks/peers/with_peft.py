"""with_peft.py BASE OUT SHARD_BYTES ADAPTER...: fuse with PEFT's merge_and_unload, on the CPU in bf16."""

import sys

import torch
from diffusers import QwenImageTransformer2DModel
from peft import PeftModel

base, out, shard_bytes, *adapters = sys.argv[1:]
transformer = QwenImageTransformer2DModel.from_pretrained(base, torch_dtype=torch.bfloat16)
names = [f"lora{index}" for index in range(len(adapters))]
model = PeftModel.from_pretrained(transformer, adapters[0], adapter_name=names[0], low_cpu_mem_usage=True)
for name, adapter in zip(names[1:], adapters[1:], strict=True):
    model.load_adapter(adapter, adapter_name=name, low_cpu_mem_usage=True)
model.merge_and_unload(adapter_names=names).save_pretrained(out, max_shard_size=int(shard_bytes))
