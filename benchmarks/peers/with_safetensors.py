"""with_safetensors.py BASE OUT SHARD_BYTES LORA...: the script one writes oneself; a shard at a time, in fp32."""

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

base, out, loras = Path(sys.argv[1]), Path(sys.argv[2]), [load_file(path) for path in sys.argv[4:]]
out.mkdir()
for path in sorted(base.iterdir()):
    if path.suffix != ".safetensors":
        shutil.copyfile(path, out / path.name)
        continue
    tensors = load_file(path)
    for name, weight in tensors.items():
        stem, fused = name.removesuffix(".weight"), None
        for lora in loras:
            if (down := lora.get(f"{stem}.lora_down.weight")) is not None:
                scale = lora[f"{stem}.alpha"].item() / len(down)
                fused = weight.float() if fused is None else fused
                fused = fused + scale * (lora[f"{stem}.lora_up.weight"].float() @ down.float())
        if fused is not None:
            tensors[name] = fused.to(weight.dtype)
    save_file(tensors, out / path.name, metadata={"format": "pt"})
