"""The output is complete or not there: kills, signals, full disks, faults, two runs at once, inputs that change."""

from __future__ import annotations

import collections
import fcntl
import hashlib
import os
import random
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import make_factors, save_model, write_lora
from fork_server import Forks, Job

from lorafuse_common import hashing, tensorfile
from lorafuse_common import publish as publishing
from lorafuse_common.dialects.lightning import LIGHTNING
from lorafuse_common.errors import OutputError
from lorafuse_common.manifest import MANIFEST_NAME, find_lora, read_manifest, verify_manifest
from lorafuse_common.publish import publish, recover
from lorafuse_common.tensorfile import read_header
from lorafuse_fuse import carry, edit, execute, fuse, stream

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as server:
        yield server


class Place:
    """A base, a LoRA and where the fused checkpoint goes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.base = folder / "base"
        save_model(self.base / "transformer", sharded=True)
        (self.base / "vae").mkdir()
        (self.base / "vae" / "model.safetensors").write_bytes(b"v" * 50000)
        (self.base / "model_index.json").write_text('{"_class_name": "QwenImagePipeline"}')
        self.lora = write_lora(folder / "lora.safetensors", make_factors(), LIGHTNING, 2.0)
        self.inputs = self.hashes(self.base) | self.hashes(self.lora)
        self.weights = self.base / "transformer" / "diffusion_pytorch_model-00002-of-00008.safetensors"

    def args(self, strength: float = 1.0, *more: str) -> list[str]:
        return ["fuse", str(self.base), "--lora", f"{self.lora}:{strength}", "--out", str(self.out), *more]

    def hashes(self, root: Path) -> dict[str, str]:
        files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
        return {str(p.relative_to(self.folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def strength(self) -> float | None:
        """Of the complete, verified checkpoint that is there; None where nothing is."""
        if not os.path.lexists(self.out):  # a link to nothing is something
            return None
        manifest = read_manifest(self.out)
        assert manifest, "an output without its manifest"
        verify_manifest(self.out, manifest, hashes=True)
        assert {p.relative_to(self.out).as_posix() for p in self.out.rglob("*") if p.is_file()} == {
            MANIFEST_NAME, *(record.path for record in manifest.outputs), *(str(lora.file) for lora in manifest.loras)
        }  # fmt: skip
        assert all(find_lora(lora, self.out) for lora in manifest.loras)
        for path in (self.out / "transformer").glob("*.safetensors"):
            read_header(path)
        return manifest.loras[0].strength

    def phase(self, before: float | None) -> str:
        """Where in its course a run was killed that began when there was `before`."""
        staged = [p for p in self.folder.iterdir() if p.name.startswith(".out.lorafuse-")]
        complete = [p for p in staged if (p / MANIFEST_NAME).is_file()]
        if not self.out.exists() and before:
            return "4 between two renames"
        if complete:
            return "3 complete, or replaced"
        if any(p.name.startswith(".out.lorafuse-new-") for p in staged):
            return "2 writing, or removing"
        return "1 before" if self.strength() == before else "5 put in place"

    def check_inputs(self) -> None:
        assert self.hashes(self.base) | self.hashes(self.lora) == self.inputs


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.slow
def test_100_kills_at_random_moments(forks: Forks, place: Place) -> None:
    """Before the kill there is nothing, or a whole checkpoint; after it, that, or the whole new one."""
    rng = random.Random(4)
    seconds = [forks.run(Job(place.args()))[0].seconds for _ in range(3)]
    shutil.rmtree(place.out)
    phases: collections.Counter[str] = collections.Counter()
    for number in range(100):
        if number == 40:  # from here on there is one that is replaced
            assert forks.run(Job(place.args(0.25)))[0].code == 0
        before = place.strength()
        wanted = 0.5 if before != 0.5 else 1.0
        after = rng.uniform(0.3, 1.15) * sorted(seconds)[1]  # a third goes by until the arguments are read
        (done,) = forks.run(Job(place.args(wanted, "--force"), signal.SIGKILL, after))
        phases["6 finished" if done.code == 0 else place.phase(before)] += 1
        assert done.code in (0, -signal.SIGKILL), done.err
        assert place.strength() in (before, wanted) if done.code else place.strength() == wanted
        if number < 40 and place.out.exists():
            shutil.rmtree(place.out)
    place.check_inputs()
    print(dict(sorted(phases.items())))  # noqa: T201  # shown with -s
    assert phases["2 writing, or removing"] > 5  # 80 on an idle machine
    assert forks.run(Job(place.args(0.125, "--force")))[0].code == 0
    assert place.strength() == 0.125
    assert place.names() == ["base", "lora.safetensors", "out"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("replaces", "exchanges"), [(False, True), (True, True), (True, False)], ids=["new", "exchanged", "two renames"]
)
def test_a_kill_at_every_change_of_the_disk(forks: Forks, place: Place, replaces: bool, exchanges: bool) -> None:
    """So around each rename, too, also where two names cannot be exchanged in one step."""
    assert forks.run(Job(place.args()))[0].code == 0
    phases: collections.Counter[str] = collections.Counter()
    change, done, phase = 0, None, ""
    while not done or done.code:
        change += 1 if phase > "3" else 3  # every one once all is written
        if not replaces:
            shutil.rmtree(place.out, ignore_errors=True)
        before = place.strength()
        wanted = 0.5 if before != 0.5 else 1.0
        (done,) = forks.run(Job(place.args(wanted, "--force"), at_change=change, exchanges=exchanges))
        phase = place.phase(before)
        phases[phase] += 1
        assert done.code in (0, -signal.SIGKILL), done.err
        assert place.strength() in ((before, wanted) if exchanges else (before, wanted, None))
        recover(place.out)  # what the next run does first
        assert place.strength() in (before, wanted)
        assert [name for name in place.names() if name != "out"] == ["base", "lora.safetensors"]
    place.check_inputs()
    print(change, dict(sorted(phases.items())))  # noqa: T201
    assert phases["2 writing, or removing"] > 5
    assert phases["3 complete, or replaced"] > 3
    assert (phases["4 between two renames"] > 0) == (not exchanges)
    assert forks.run(Job(place.args(0.125, "--force")))[0].code == 0
    assert place.strength() == 0.125
    assert place.names() == ["base", "lora.safetensors", "out"]


WORDS = ("interrupted", "terminated", "the terminal was closed")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_at_random_moments(forks: Forks, place: Place, number: int) -> None:
    """They end it at once, with one line and the shell's status, and nothing is left."""
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("this signal is ignored here, as nohup has it")
    rng = random.Random(number)
    seconds = forks.run(Job(place.args()))[0].seconds
    shutil.rmtree(place.out)
    stopped = 0
    for _ in range(15):
        (done,) = forks.run(Job(place.args(), number, rng.uniform(0, seconds)))
        if done.code == 0:
            assert place.strength() == 1.0
            seconds = min(seconds, done.seconds)  # the first run may have been the slow one
        elif done.code == -number:  # before it began, or after its end
            assert not done.err or place.strength() == 1.0
        else:
            last = done.err.splitlines()[-1]
            assert done.code == 128 + number, done.err
            said = f"but {place.out} was complete already" if place.out.exists() else "nothing was written"
            assert last.endswith(said) or last in WORDS, done.err
            assert "Traceback" not in done.err
            stopped += 1
        assert place.strength() in (None, 1.0)
        shutil.rmtree(place.out, ignore_errors=True)
        assert place.names() == ["base", "lora.safetensors"]
    assert stopped > 0  # 10 on an idle machine
    place.check_inputs()


def test_a_signal_while_names_are_exchanged_waits(tmp_path: Path) -> None:
    """And while what was replaced is removed: a second Ctrl-C leaves nothing behind."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    removing = shutil.rmtree

    def interrupted(path: Path, **more: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        removing(path, **more)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", interrupted)
        with publish(tmp_path / "out", replace=True) as staging:
            (staging / "new").write_text("")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "new"]


def test_publishing_in_a_thread(tmp_path: Path) -> None:
    """Only the main thread may handle signals."""

    def write() -> None:
        with publish(tmp_path / "out") as staging:
            (staging / "new").write_text("")

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "new"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk")
def test_a_disk_that_fills(run: Run, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = place.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this system does not let root mount a tmpfs")
    try:
        place.out = disk / "deep" / "out"
        code, _, err = run(*place.args())
        assert code == 1
        assert "its disk has 0.0 MB free" in err  # seen before anything is written
        monkeypatch.setattr(execute, "free_bytes", lambda folder: 1 << 40)  # but others write, too
        sizes = [*range(16, 560, 32), 4096]
        for size in sizes:
            subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
            code, _, err = run(*place.args())
            if code == 0:
                break
            assert err.splitlines()[-1].startswith(f"error: {place.out}: nothing was written: No space left on device")
            assert [*disk.iterdir()] == []
        assert code == 0
        assert size > 400
        assert place.strength() == 1.0
        subprocess.run(["mount", "-o", "remount,size=600k", str(disk)], check=True)
        assert run(*place.args(0.5, "--force"))[0] == 1
        assert place.strength() == 1.0
        assert [path.name for path in (disk / "deep").iterdir()] == ["out"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    place.check_inputs()


def test_a_limit_on_the_size_of_files(forks: Forks, place: Place) -> None:
    """Fails as a quota does, in the middle of a file."""
    for limit in (20000, 35000, 50000):
        (done,) = forks.run(Job(place.args(), largest_file=limit))
        assert (done.code, done.err.splitlines()[-1]) == (1, f"error: {place.out}: nothing was written: File too large")
        assert place.names() == ["base", "lora.safetensors"]
    place.check_inputs()


@pytest.mark.parametrize("call", range(0, 14, 3))
def test_a_disk_that_fails_to_keep(run: Run, place: Place, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Some file systems tell of a full or broken disk only when files are synced."""
    calls, syncing = iter(range(1000)), os.fsync

    def failing(handle: int) -> None:
        if next(calls) == call:
            raise OSError(5, "Input/output error")
        syncing(handle)

    monkeypatch.setattr(os, "fsync", failing)
    code, _, err = run(*place.args())
    assert code == 1
    assert "nothing was written: Input/output error" in err
    assert place.names() == ["base", "lora.safetensors"]


def test_a_disk_that_does_not_confirm_the_last_rename(run: Run, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too late to say that nothing was written."""
    syncing = publishing._sync

    def failing(path: Path) -> None:
        if path == place.folder:
            raise OSError(5, "Input/output error")
        syncing(path)

    monkeypatch.setattr(publishing, "_sync", failing)
    code, _, err = run(*place.args())
    assert code == 1
    assert "is written, but its disk did not confirm that: Input/output error" in err
    assert place.strength() == 1.0
    assert place.names() == ["base", "lora.safetensors", "out"]


@pytest.mark.parametrize("reads", ["transformer", "lora.safetensors"])
def test_a_disk_that_cannot_be_read(run: Run, place: Place, monkeypatch: pytest.MonkeyPatch, reads: str) -> None:
    """The file that cannot be read is named, not the output."""
    opening = Path.open

    class Broken:
        def __init__(self, file: Any) -> None:
            self.file = file

        def readinto(self, room: memoryview) -> int:
            raise OSError(5, "Input/output error")

        read = readinto

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

    def opened(path: Path, mode: str = "r", *more: Any, **options: Any) -> Any:
        file = opening(path, mode, *more, **options)
        is_broken = mode == "rb" and reads in (path.name, path.parent.name) and path.suffix == ".safetensors"
        return Broken(file) if is_broken else file

    monkeypatch.setattr(Path, "open", opened)
    code, _, err = run(*place.args())
    monkeypatch.undo()
    assert code == 1
    assert err.splitlines()[-1].startswith(f"error: {place.folder}")
    assert reads in err.splitlines()[-1]
    assert "cannot be read: Input/output error" in err
    assert place.names() == ["base", "lora.safetensors"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "there is not enough memory"),
        (RuntimeError("DefaultCPUAllocator:\n can't allocate memory"), "RuntimeError: DefaultCPUAllocator: can't"),
        (ValueError("x" * 10000), "a fault in lorafuse itself: ValueError: xxx"),
        (OSError(122, "Disk quota exceeded"), "nothing was written: Disk quota exceeded"),
    ],
    ids=["memory", "torch", "bug", "quota"],
)
@pytest.mark.parametrize(
    ("owner", "name"),
    [(edit.Editor, "__init__"), (edit.Editor, "change"), (stream.Stream, "_put"), (stream.Stream, "_finish")],
)
def test_a_fault_in_a_worker_is_one_line(
    run: Run, place: Place, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception, says: str
) -> None:
    calls, original = iter(range(100)), getattr(owner, name)

    def failing(*args: object) -> object:
        if next(calls) == 1:
            raise error
        return original(*args)

    monkeypatch.setattr(owner, name, failing)
    code, _, err = run(*place.args())
    monkeypatch.undo()
    assert code == 1
    assert says in err.splitlines()[-1]
    assert len(err.splitlines()[-1]) < 1000
    assert "Traceback" not in err
    assert place.names() == ["base", "lora.safetensors"]
    place.check_inputs()
    assert run(*place.args())[0] == 0


def _touch(path: Path) -> None:
    path.touch()


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def _overwrite(path: Path) -> None:
    """In place, and as if it had not been."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _exchange(path: Path) -> None:
    """By one of the same size, time and content."""
    shutil.copy2(path, path.with_name("copy"))
    path.with_name("copy").replace(path)


def _remove(path: Path) -> None:
    path.unlink()


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


CHANGES = (_touch, _append, _overwrite, _exchange, _remove, _truncate)


def changing(path: Path, change: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch, at: int = 1) -> None:
    """Change an input when the given tensor is written."""
    calls, passing = iter(range(1000)), execute._pass

    def changed(*args: Any) -> Any:
        if next(calls) == at:
            change(path)
        return passing(*args)

    monkeypatch.setattr(execute, "_pass", changed)


@pytest.mark.parametrize("at", [0, 70])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("what", ["lora", "weights", "vae", "config.json", "index", "model_index.json"])
def test_inputs_that_change_meanwhile(
    run: Run, place: Place, monkeypatch: pytest.MonkeyPatch, what: str, change: Callable[[Path], object], at: int
) -> None:
    path = {
        "lora": place.lora,
        "weights": place.weights,
        "vae": place.base / "vae" / "model.safetensors",
        "config.json": place.base / "transformer" / "config.json",
        "index": place.base / "transformer" / "diffusion_pytorch_model.safetensors.index.json",
        "model_index.json": place.base / "model_index.json",
    }[what]
    changing(path, change, monkeypatch, at)
    code, _, err = run(*place.args())
    assert code == 1, (what, change)
    assert str(path) in err.splitlines()[-1]
    assert len(err.splitlines()[-1]) < 600
    assert "Traceback" not in err
    assert not place.out.exists()
    assert [name for name in place.names() if name.startswith(".")] == []


@pytest.mark.parametrize("name", ["adapter_config.json", "base/lorafuse.json"])
def test_files_that_turn_up_meanwhile(run: Run, place: Place, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """They would have taken part."""
    changing(place.folder / name, lambda path: path.write_text("{}"), monkeypatch)
    code, _, err = run(*place.args())
    assert code == 1
    assert name in err.splitlines()[-1]
    assert not place.out.exists()


@pytest.mark.parametrize("what", ["lora", "weights"])
def test_inputs_that_change_after_their_headers_were_read(
    run: Run, place: Place, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """But before a byte of them is: the plan is of what they were."""
    checking = fuse.check_out

    def changed(*args: Any) -> None:
        _overwrite(place.lora if what == "lora" else place.weights)
        checking(*args)

    monkeypatch.setattr(fuse, "check_out", changed)
    code, _, err = run(*place.args())
    assert code == 1
    assert "changed while being read" in err
    assert not place.out.exists()


def test_links_that_lead_elsewhere_meanwhile(run: Run, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a newer revision in the hub's cache."""
    shutil.copy2(place.lora, place.folder / "blob")
    place.lora.rename(place.folder / "old")
    place.lora.symlink_to("old")

    def repoint(path: Path) -> None:
        path.unlink()
        path.symlink_to("blob")

    changing(place.lora, repoint, monkeypatch)
    assert run(*place.args())[0] == 1
    assert not place.out.exists()


def test_a_changed_input_is_not_remembered_by_its_old_hash(
    run: Run, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of hashes has to forget what was hashed while it changed."""
    monkeypatch.setattr(hashing, "_RACY_NS", -(10**18))
    changing(place.weights, _overwrite, monkeypatch, at=70)
    assert run(*place.args())[0] == 1
    monkeypatch.undo()
    assert run(*place.args())[0] == 0
    manifest = read_manifest(place.out)
    assert manifest
    recorded = {record.path: record.sha256 for record in manifest.base}
    path = place.weights.relative_to(place.base).as_posix()
    assert recorded[path] == hashlib.sha256(place.weights.read_bytes()).hexdigest()
    assert manifest.loras[0].sha256 == hashlib.sha256(place.lora.read_bytes()).hexdigest()


def test_two_runs_onto_the_same_out(run: Run, place: Place) -> None:
    """The second says so at once, whatever it would find; another output is another matter."""
    with publish(place.out) as staging:
        for out in (place.out, place.folder / "." / "base" / ".." / "out"):
            code, _, err = run("fuse", place.base, "--lora", place.lora, "--out", out)
            assert code == 1
            assert "another lorafuse run is writing it right now" in err.splitlines()[-1]
        for name in ("ou", "out2", "out.b", "out.lorafuse", ".out"):
            code, _, err = run("fuse", place.base, "--lora", place.lora, "--out", place.folder / name)
            assert code == 0, err
        (staging / "mine").write_text("")
    assert [p.name for p in place.out.iterdir()] == ["mine"]
    assert [name for name in place.names() if "lorafuse-" in name or "lock" in name] == []


@pytest.mark.slow
def test_two_processes_that_start_at_once(forks: Forks, place: Place) -> None:
    """One wins; the other says so, or came early or late enough to find the work done."""
    lost = number = 0
    while number < 8 or (not lost and number < 50):
        number += 1
        done = forks.run(Job(place.args(1.0 if number % 2 else 0.5, "--force"), runs=2))
        assert 0 in [d.code for d in done], done
        for other in done:
            said = other.err.splitlines()[-1]
            assert other.code in (0, 1)
            assert other.code == 0 or "another lorafuse run" in said or "was changed by another run" in said, said
            lost += other.code
        assert place.strength() == (1.0 if number % 2 else 0.5)
        assert place.names() == ["base", "lora.safetensors", "out"]
    assert lost > 0
    place.check_inputs()


def test_an_output_that_another_run_wrote_meanwhile(run: Run, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking and locking; it is not replaced without having been looked at."""
    checking = fuse._check_space

    def written(*args: Any) -> None:
        place.out.mkdir()
        (place.out / "precious").write_text("")
        checking(*args)

    monkeypatch.setattr(fuse, "_check_space", written)
    code, _, err = run(*place.args())
    assert code == 1
    assert "was changed by another run meanwhile" in err
    assert [p.name for p in place.out.iterdir()] == ["precious"]


LEFT = (".out.lorafuse-new-abcdefgh", ".out.lorafuse-new-0_______")
OTHERS = (
    ".out2.lorafuse-new-abcdefgh", ".out.b.lorafuse-new-abcdefgh", ".out.lorafuse-new-abc", ".out.staging-abcdefgh",
    ".out.lorafuse-new-abcdefgh.txt", ".out2.lorafuse.lock",
)  # fmt: skip


def test_what_a_killed_run_left_is_removed(run: Run, place: Place) -> None:
    """By the next run, even if it finds nothing to do; what is not of a run for this output stays."""
    for _ in range(2):
        for name in (*LEFT, *OTHERS[:-1]):
            (place.folder / name / "transformer").mkdir(parents=True, exist_ok=True)
            (place.folder / name / "transformer" / "x.safetensors").write_bytes(b"x")
        for name in (".out.lorafuse.lock", OTHERS[-1]):
            (place.folder / name).write_text("")
        code, _, err = run(*place.args())
        assert code == 0, err
        assert place.names() == sorted([*OTHERS, "base", "lora.safetensors", "out"])


def test_what_was_moved_aside_comes_back(run: Run, place: Place) -> None:
    """Where a run was killed between the two renames that replace an output; a half-removed one does not."""
    assert run(*place.args())[0] == 0
    aside = place.folder / ".out.lorafuse-old-abcdefgh"
    place.out.rename(aside)
    code, _, err = run(*place.args())
    assert code == 0
    assert "up to date" in err
    shutil.copytree(place.out, aside)
    (aside / MANIFEST_NAME).unlink()
    assert run(*place.args())[0] == 0
    assert place.strength() == 1.0
    assert place.names() == ["base", "lora.safetensors", "out"]


@pytest.mark.parametrize("code", [95, 38, 9, 37])
def test_file_systems_without_locks(run: Run, place: Place, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Go without saying; what may be another run's staging then stays."""

    def failing(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", failing)
    (place.folder / LEFT[0]).mkdir()
    code, _, err = run(*place.args())
    assert code == 0, err
    assert place.names() == sorted([LEFT[0], "base", "lora.safetensors", "out"])


def test_the_lock_of_another_user_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opening = Path.open

    def opened(path: Path, mode: str = "r", *more: Any, **options: Any) -> Any:
        if mode == "ab":
            raise PermissionError(13, "Permission denied")
        return opening(path, mode, *more, **options)

    with publish(tmp_path / "out"):
        monkeypatch.setattr(Path, "open", opened)
        with pytest.raises(OutputError, match="another lorafuse run"), publish(tmp_path / "out"):
            pass


def test_a_lock_that_goes_while_one_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file was opened before its owner removed it, so it locks nothing: another is made."""
    locking = fcntl.flock

    def removed(*args: Any) -> None:
        monkeypatch.setattr(fcntl, "flock", locking)
        (tmp_path / ".out.lorafuse.lock").unlink()
        locking(*args)

    monkeypatch.setattr(fcntl, "flock", removed)
    with publish(tmp_path / "out"), pytest.raises(OutputError, match="another"), publish(tmp_path / "out"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_outputs_behind_links(run: Run, place: Place) -> None:
    """What a link points to is written, and stays where it is: on the large disk."""
    (place.folder / "large").mkdir()
    place.out.symlink_to("large/fused")
    for strength in (1.0, 0.5):
        code, _, err = run(*place.args(strength, "--force"))
        assert code == 0, err
        assert place.out.is_symlink()
        assert place.strength() == strength
        assert [p.name for p in (place.folder / "large").iterdir()] == ["fused"]


def test_outputs_that_cannot_be(run: Run, place: Place) -> None:
    (place.folder / "loop").symlink_to("loop")
    (place.folder / "file").write_text("")
    os.mkfifo(place.folder / "pipe")
    before = place.names()
    for out, says in {
        place.folder / "loop": "links lead in a circle",
        place.folder / "loop" / "out": "links lead in a circle",
        place.folder / "file": "is no fused checkpoint",
        place.folder / "file" / "out": "file is no folder",
        place.folder / "pipe": "is no fused checkpoint",
        place.folder / "new" / ("x" * 300): "File name too long",
        place.folder / ("x" * 250): "File name too long",
        Path("/"): "is where a disk is mounted",
        Path("/dev/shm"): "is where a disk is mounted",
        Path("/proc/lorafuse"): "its disk has 0.0 MB free",
    }.items():
        for force in ((), ("--force",)):
            code, _, err = run("fuse", place.base, "--lora", place.lora, "--out", out, *force)
            assert code == 1, out
            assert says in err.splitlines()[-1]
            assert "Traceback" not in err
            assert place.names() == before


def test_folders_made_on_the_way_go_with_a_failure(run: Run, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.out = place.folder / "a" / "b" / "out"
    with monkeypatch.context() as patch:
        changing(place.lora, _touch, patch)
        assert run(*place.args())[0] == 1
    assert place.names() == ["base", "lora.safetensors"]
    assert run(*place.args())[0] == 0
    assert place.strength() == 1.0


@pytest.mark.parametrize("options", [(), ("--dtype", "float32"), ("--components", "copy")])
def test_space_is_counted_as_it_will_be_used(
    run: Run, place: Place, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """Wider tensors and copies of other components, and with `link` the small files that are copied anyway."""
    monkeypatch.setattr(carry, "SMALL_BYTES", 10000)
    monkeypatch.setattr(carry, "reflink", lambda source, target: False)
    monkeypatch.setattr(fuse, "SMALL_BYTES", 10000)
    monkeypatch.setattr(execute, "free_bytes", lambda folder: 1)
    code, _, err = run(*place.args(1.0, *options))
    assert code == 1
    needed = float(err.splitlines()[-1].split("needs ")[1].split(" MB")[0])
    monkeypatch.setattr(execute, "free_bytes", lambda folder: 1 << 40)
    assert run(*place.args(1.0, *options))[0] == 0
    used = sum(p.stat().st_size for p in place.out.rglob("*") if p.is_file() and not p.is_symlink())
    manifest = (place.out / MANIFEST_NAME).stat().st_size
    assert needed == pytest.approx((used - manifest) / 1e6, abs=0.06)  # told to 0.1 MB; headers grow by a recipe


def test_names_that_are_no_text(run: Run, place: Place) -> None:
    """Linux's file names are bytes."""
    strange = Path(os.fsdecode(os.fsencode(place.folder) + b"/l\xff\x1b[2J.safetensors"))
    place.lora.rename(strange)
    code, _, err = run("fuse", place.base, "--lora", strange, "--out", place.out)
    assert code == 1
    assert err.splitlines()[-1] == (
        r"error: l\udcff\x1b[2J.safetensors: its name is no UTF-8, so the manifest cannot hold it; rename the file"
    )
    place.out = place.folder / os.fsdecode(b"out\xff")  # where things lie is in no manifest
    strange.rename(place.lora)
    assert run(*place.args())[0] == 0
    assert place.strength() == 1.0


@pytest.mark.parametrize("command", ["fuse", "inspect", "verify", "convert"])
def test_names_that_no_file_can_have(run: Run, place: Place, command: str) -> None:
    name = "x" * 300
    more = {"fuse": ["--lora", name, "--out", name], "convert": ["--to", "peft", "--out", name + ".safetensors"]}
    code, _, err = run(command, name, *more.get(command, []))
    assert code == 1
    assert err.startswith(f"error: {name}")
    assert len(err.splitlines()) == 1


def test_control_characters_of_files_are_shown_and_not_obeyed(run: Run, place: Place) -> None:
    factors = {"\x1b[2J\x07\r" + name: its for name, its in make_factors().items()}
    write_lora(place.lora, factors, LIGHTNING, 2.0, metadata={"\x1b]0;title\x07": "\x1b[31m"})
    for args in (place.args(), ["inspect", str(place.lora)]):
        _, out, err = run(*args)
        assert not {"\x1b", "\x07", "\r"} & set(out + err)


def test_a_broken_output_is_not_published(run: Run, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should what was written ever not fit its header."""
    encoding = tensorfile.encode_header
    monkeypatch.setattr(execute, "encode_header", lambda *args: encoding(*args)[:-8])
    code, _, err = run(*place.args())
    assert code == 1
    assert "Traceback" not in err
    assert place.names() == ["base", "lora.safetensors"]
