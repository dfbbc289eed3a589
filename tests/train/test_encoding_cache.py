"""The cache: keyed by content, whole or absent, and sparing the encoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from train import tiny

from lorafuse_common.errors import DatasetError
from lorafuse_train.dataset.data import Prompt
from lorafuse_train.encoding import cache, encode
from lorafuse_train.encoding.cache import Cache
from lorafuse_train.options.options import resolve_config
from lorafuse_train.plan import Plan, plan_training
from lorafuse_train.recipes.qwen_image import QwenImage

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_pipeline(tmp_path_factory.mktemp("cache") / "base")


class Counting(QwenImage):
    """Counts what is loaded and encoded."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("vae", "text_encoder", "picture", "caption"), 0)

    def load_vae(self, *args):  # type: ignore[no-untyped-def]
        self.counts["vae"] += 1
        return super().load_vae(*args)

    def load_text_encoder(self, *args):  # type: ignore[no-untyped-def]
        self.counts["text_encoder"] += 1
        return super().load_text_encoder(*args)

    def encode_image(self, *args):  # type: ignore[no-untyped-def]
        self.counts["picture"] += 1
        return super().encode_image(*args)

    def encode_text(self, *args):  # type: ignore[no-untyped-def]
        self.counts["caption"] += 1
        return super().encode_text(*args)


def planned(base: Path, data: Path, recipe: QwenImage, **options: str) -> Plan:
    given = {"fused_model": str(base), "dataset_base_path": str(data), "output_path": str(data / "out"), **options}
    plan = plan_training(resolve_config({**given, "allow_unfused_base": True}))
    return Plan(plan.config, plan.base, recipe, plan.targets, plan.samples)


def fill(base: Path, data: Path, *prompts: str, **options: str) -> tuple[int, int, int, int]:
    """Fill the cache; how often a VAE and a text encoder were loaded, and pictures and texts encoded."""
    recipe = Counting()
    plan = planned(base, data, recipe, **options)
    encode.fill_cache(encode.open_cache(plan), plan, map(Prompt, prompts), CPU)
    counts = recipe.counts
    return counts["vae"], counts["text_encoder"], counts["picture"], counts["caption"]


def test_only_what_changed_is_encoded_again(base: Path, tmp_path: Path) -> None:
    data = tiny.save_dataset(tmp_path / "data")
    assert fill(base, data, "a prompt", " ") == (1, 1, 4, 4 + 2)
    assert fill(base, data, "a prompt", " ") == (0, 0, 0, 0)
    assert fill(base, data, "another", " ") == (0, 1, 0, 1)
    (data / "0.png").write_bytes((data / "1.png").read_bytes())
    assert fill(base, data) == (0, 0, 0, 0)  # the same bytes under another name
    raw = bytearray((data / "2.png").read_bytes())
    (data / "2.png").write_bytes(bytes(raw) + b"one more byte, the same pixels")
    assert fill(base, data) == (1, 0, 1, 0)
    assert fill(base, data, height="16", width="16") == (1, 0, 3, 0)
    assert fill(base, data, cache_dir=str(tmp_path / "elsewhere")) == (1, 1, 3, 4)


def test_damaged_entries_are_encoded_again(base: Path, tmp_path: Path) -> None:
    data = tiny.save_dataset(tmp_path / "data", ((32, 32),) * 3)
    fill(base, data)
    latents, texts = (sorted((data / ".lorafuse_cache" / kind).rglob("*.safetensors")) for kind in ("latents", "text"))
    whole = [path.read_bytes() for path in (*latents, *texts)]
    latents[0].write_bytes(whole[0][:-7])
    latents[1].write_bytes(b"")
    flipped = bytearray(texts[0].read_bytes())
    flipped[-3] ^= 1
    texts[0].write_bytes(flipped)
    assert fill(base, data) == (1, 1, 2, 1)
    assert [path.read_bytes() for path in (*latents, *texts)] == whole


def test_other_encoders_have_other_keys(base: Path, tmp_path: Path) -> None:
    data = tiny.save_dataset(tmp_path / "data", ((32, 32),))
    plan = planned(base, data, QwenImage())
    found = encode.open_cache(plan)
    sample = plan.samples[0]
    keys = {
        Cache(found.root, vae, text, recipe).latents(sample)
        for vae, text, recipe in (
            (found.vae_sha256, found.text_sha256, found.recipe),
            (found.vae_sha256, "other", found.recipe),  # no other text encoder changes a picture
            ("other", found.text_sha256, found.recipe),
            (found.vae_sha256, found.text_sha256, "qwen_image 2"),
        )
    }
    assert len(keys) == 3
    a, b = Prompt("a"), Prompt("b")
    assert found.text(a) != found.text(b) != Cache(found.root, found.vae_sha256, "other", found.recipe).text(b)


def test_what_is_read_back_is_what_was_encoded(base: Path, tmp_path: Path) -> None:
    data = tiny.save_dataset(tmp_path / "data", ((32, 24),))
    plan = planned(base, data, QwenImage())
    encode.fill_cache(encode.open_cache(plan), plan, (), CPU)
    encodings = encode.Encodings(encode.open_cache(plan))
    latents = encodings.latents(plan.samples[0])
    assert latents.shape == (4, 6, 8)
    assert latents.dtype == torch.float32
    recipe = QwenImage()
    encoder = recipe.load_text_encoder(base, CPU)
    caption = plan.samples[0].caption
    assert encodings.caption(caption)["embeds"].equal(recipe.encode_text(encoder, caption)["embeds"])


def test_a_picture_that_changes_after_the_check_is_an_error(base: Path, tmp_path: Path) -> None:
    data = tiny.save_dataset(tmp_path / "data", ((32, 32),) * 2)
    plan = planned(base, data, QwenImage())
    (data / "1.png").write_bytes((data / "0.png").read_bytes())
    with pytest.raises(DatasetError, match=r"1\.png: was changed"):
        encode.fill_cache(encode.open_cache(plan), plan, (), CPU)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        cache.store(tmp_path / "entry.safetensors", {"x0": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []
