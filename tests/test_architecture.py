"""Imports point one way, and starting the fuse tool costs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

MAY_IMPORT = {
    "lorafuse_common": {"lorafuse_common", "torch", "safetensors"},
    "lorafuse_common/families": {"lorafuse_common"},
    "lorafuse_common/dialects": {"lorafuse_common"},
    "lorafuse_common/conversion": {"lorafuse_common", "torch"},
    "lorafuse_common/algebras": {"lorafuse_common", "torch"},
    "tools/fuse/lorafuse_fuse": {
        "lorafuse_common",
        "lorafuse_fuse",
        "torch",
        "safetensors",
        "typer",
        "tqdm",
        "huggingface_hub",
    },
}
"""Folder -> what its files may import besides the standard library."""


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports(folder: str) -> None:
    for path in (ROOT / folder).glob("*.py"):
        assert imports(path) <= MAY_IMPORT[folder], path


def test_the_tools_do_not_know_each_other() -> None:
    for path in (ROOT / "tools/train/lorafuse_train").rglob("*.py"):
        assert "lorafuse_fuse" not in imports(path), path


@pytest.mark.parametrize(
    ("command", "heavy"),
    [
        (
            "import lorafuse_fuse.cli, lorafuse_fuse.fuse, lorafuse_fuse.report, lorafuse_fuse.hub.base",
            {"torch", "numpy", "huggingface_hub"},
        ),
        ("import lorafuse_train.cli", {"torch", "diffusers", "peft", "accelerate", "transformers"}),
    ],
)
def test_start_up_imports_nothing_heavy(command: str, heavy: set[str]) -> None:
    code = f"import sys; {command}; print(*sys.modules)"
    path = ":".join(map(str, (ROOT, ROOT / "tools/fuse", ROOT / "tools/train")))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path})
    assert run.returncode == 0, run.stderr
    assert heavy.isdisjoint(run.stdout.split())
