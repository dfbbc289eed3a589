"""What names on the hub mean, and which files of a repository are needed."""

from __future__ import annotations

import pytest

from lorafuse_common.errors import ConfigError, HubError
from lorafuse_fuse.hub.files import absent_shards, lora_file, model_files, one_set_of_weights, pipeline_files
from lorafuse_fuse.hub.names import HubLora, HubName, base_name, lora_name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Qwen/Qwen-Image", HubName("Qwen/Qwen-Image", is_bare=True)),
        ("Qwen/Qwen-Image@v1.0", HubName("Qwen/Qwen-Image", "v1.0", is_bare=True)),
        ("hf://o/r", HubName("o/r")),
        ("hf://models/o/r/", HubName("o/r")),
        ("hf://o/r@refs/pr/3/sub/folder", HubName("o/r", "refs/pr/3", "sub/folder")),
        ("hf://o/r/sub/f.safetensors@refs/pr/3", HubName("o/r", "refs/pr/3", "sub/f.safetensors")),
        ("hf://o/r@feature%2Fx/f.safetensors", HubName("o/r", "feature/x", "f.safetensors")),
        ("hf://o/r/f@2x.safetensors", HubName("o/r", None, "f@2x.safetensors")),
        ("models/x.safetensors", None),
        ("models/a/b", None),
        ("models/x/", None),
        ("~/x", None),
        ("a b/c", None),
        ("o/r.git", None),
        ("o--x/r", None),
    ],
)
def test_names_of_bases(text: str, name: HubName | None) -> None:
    assert base_name(text) == name
    assert name is None or base_name(str(name)) in (name, HubName(name.repo, name.revision, name.path))


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("o/r", HubLora(HubName("o/r", is_bare=True), 1.0, None)),
        ("o/r@v1:0.8", HubLora(HubName("o/r", "v1", is_bare=True), 0.8, None)),
        ("o/r/sub/f.safetensors:-2", HubLora(HubName("o/r", None, "sub/f.safetensors", is_bare=True), -2.0, None)),
        ("hf://o/r/f@v1:0.5@transformer_2", HubLora(HubName("o/r", "v1", "f"), 0.5, "transformer_2")),
        ("hf://o/r/f.safetensors@v1@transformer", HubLora(HubName("o/r", "v1", "f.safetensors"), 1.0, "transformer")),
        ("hf://o/r/f@transformer_2:0.5", HubLora(HubName("o/r", None, "f"), 0.5, "transformer_2")),
        ("hf://o/r/f.safetensors@dit", HubLora(HubName("o/r", "dit", "f.safetensors"), 1.0, None)),
        ("hf://o/r/f.safetensors:1@dit", HubLora(HubName("o/r", None, "f.safetensors"), 1.0, "dit")),
        ("hf://o/r@transformer/f.safetensors", HubLora(HubName("o/r", "transformer", "f.safetensors"), 1.0, None)),
        ("loras/x.safetensors:0.5", None),
        ("loras/x.safetensors@transformer_2", None),
        ("o/r/folder", None),
        ("/o/r", None),
    ],
)  # fmt: skip
def test_names_of_loras(text: str, lora: HubLora | None) -> None:
    assert lora_name(text) == lora


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hf://o", "is no name on the hub"),
        ("hf://o/r@/x", "is no name on the hub"),
        ("hf://datasets/o/r", "datasets are no models"),
        ("hf://o/r/../x", "is no path in a repository"),
        ("hf://o/r@a/f.safetensors@b", "has two revisions"),
        ("hf://o/r/f.safetensors@a@b", "has two revisions; a component stands behind the strength: ...:1@b"),
    ],
)
def test_names_that_are_none(text: str, says: str) -> None:
    for read in (base_name, lora_name):
        with pytest.raises(ConfigError, match=says):
            read(text)


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        ("model.safetensors model.fp16.safetensors pytorch_model.bin", "model.safetensors"),
        ("diffusion_pytorch_model.safetensors model.safetensors", "diffusion_pytorch_model.safetensors"),
        (
            "model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json "
            "model.safetensors model.fp16-00001-of-00001.safetensors model.safetensors.index.fp16.json",
            "model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json",
        ),
        ("pytorch_model.bin pytorch_model.fp16.bin flax_model.msgpack tf_model.h5", "pytorch_model.bin"),
        ("model.fp16.safetensors model.fp16.bin", "model.fp16.safetensors"),
        (
            "own_name.safetensors own_name.safetensors.index.json",
            "own_name.safetensors own_name.safetensors.index.json",
        ),
        ("x.pt x.onnx", "x.pt"),
        ("config.json", ""),
    ],
)
def test_one_set_of_weights(names: str, weights: str) -> None:
    assert one_set_of_weights(names.split()) == set(weights.split())


def test_files_of_a_pipeline() -> None:
    needed = {
        "model_index.json", "README.md", "LICENSE.txt", "pipeline.py", "text_encoder/config.json",
        "text_encoder/pytorch_model.bin", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors",
        "tokenizer/added/merges.txt", "tokenizer/spiece.model", "custom/block.py",
        "lorafuse.json", "lorafuse/loras/0123/style.safetensors",
    }  # fmt: skip
    other = {
        "demo.mp4",
        ".gitattributes",
        "flux.safetensors",
        "flux.gguf",
        "assets/a.json",
        "transformer/x.fp8.safetensors",
    }
    parts = ("transformer", "text_encoder", "tokenizer", "custom")
    assert set(pipeline_files(needed | other, parts, ["transformer"], "hf://o/r")) == needed
    with pytest.raises(HubError, match=r"no folder 'text_encoder' with .safetensors weights.*\['transformer'\]"):
        pipeline_files(needed, parts, ["text_encoder"], "hf://o/r")
    assert absent_shards(["a-00002-of-00003.safetensors"]) == [f"a-0000{i}-of-00003.safetensors" for i in (1, 3)]
    with pytest.raises(HubError, match="at all"):
        model_files(["config.json", "model.bin"], "hf://o/r")


def test_the_lora_of_a_repository() -> None:
    assert (
        lora_file(["a.safetensors", "pytorch_lora_weights.safetensors"], "", "o/r")
        == "pytorch_lora_weights.safetensors"
    )
    assert (
        lora_file(["checkpoint-9/a.safetensors", "b.safetensors"], "checkpoint-9", "o/r")
        == "checkpoint-9/a.safetensors"
    )
    with pytest.raises(HubError, match="file that could be a LoRA"):
        lora_file(["a.bin"], "", "o/r")
