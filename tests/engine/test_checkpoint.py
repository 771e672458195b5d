"""Checkpoints under kills, full disks and altered files; and what a resume on another machine says."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hotloop.engine import files
from hotloop.engine.train.checkpoint import CheckpointError, CheckpointStore, best, latest, verify
from hotloop.engine.train.environment import CHANGES_BITS, STILL_HOLDS, environment, guarantee_lost
from hotloop.engine.train.tensor_file import SAFETENSORS_DTYPES, safetensors_parts

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def tensors_of(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    w = torch.randn(64, 48, generator=generator)
    return {
        "model": {"w": w, "transposed": w.t(), "low": w.bfloat16(), "empty": torch.empty(0, 3)},
        "optimizer": {"step": torch.tensor(float(step)), "m": w.square(), "codes": (w * 9).to(torch.int8), "up": w > 0},
    }


def assert_holds(checkpoint, step: int) -> None:
    assert checkpoint.step == step
    for group, members in tensors_of(step).items():
        loaded = checkpoint.tensors(group)
        assert loaded.keys() == members.keys()
        for name, tensor in members.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name], tensor), (group, name)
    assert checkpoint.state() == {"step": step, "lr": 0.1 * step}


def save(store: CheckpointStore, step: int, metric: float | None = None, *, background: bool = False) -> None:
    state = {"step": step, "lr": 0.1 * step}
    if background:
        store.save_async(step, tensors_of(step), state, metric)
        store.wait()
    else:
        store.save(step, tensors_of(step), state, metric)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("background", [False, True])
def test_what_is_saved_is_loaded(tmp_path: Path, background: bool) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 7, metric=1.5, background=background)
    found = store.latest()
    assert found.rejected == []
    assert_holds(found.checkpoint, 7)
    assert found.checkpoint.metric == 1.5
    assert names(tmp_path / "step-00000007") == sorted(FILES)
    with pytest.raises(CheckpointError, match="no tensors 'ema' \\(it has model, optimizer\\)"):
        found.checkpoint.tensors("ema")


def test_async_writes_the_same_bytes_and_reports_them_once(tmp_path: Path) -> None:
    one, two = CheckpointStore(tmp_path / "one"), CheckpointStore(tmp_path / "two")
    for step in (1, 2):  # the second save of `two` reuses the host copies of the first
        written = one.save(step, tensors_of(step), {"a": 0.1}, None)
        stall = two.save_async(step, tensors_of(step), {"a": 0.1}, None)
        two.wait()
        (in_background,) = two.finished()
        assert in_background.checkpoint.files == written.checkpoint.files
        assert stall > 0
        assert two.finished() == []
    assert one.finished() == []


def test_host_copies_are_reused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1, background=True)
    before = {key: buffer.data_ptr() for key, buffer in store._buffers.items()}
    save(store, 2, background=True)
    assert {key: buffer.data_ptr() for key, buffer in store._buffers.items()} == before
    assert_holds(store.latest().checkpoint, 2)


@pytest.mark.parametrize("dtype", list(SAFETENSORS_DTYPES))
def test_every_dtype_reads_back_through_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 2, (3, 5, 8), dtype=torch.uint8)
    tensor = raw.view(dtype) if dtype != torch.bool else raw.bool()
    odd = {"x": tensor, "a": torch.arange(3, dtype=torch.uint8), "b": torch.tensor(1.0, dtype=torch.float64)}
    files.write_synced(tmp_path / "t", safetensors_parts(odd))
    loaded = load_file(tmp_path / "t")
    for name, expected in odd.items():
        assert loaded[name].dtype == expected.dtype
        assert loaded[name].shape == expected.shape
        assert torch.equal(loaded[name].contiguous().view(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def test_tensors_are_aligned_in_the_file(tmp_path: Path) -> None:
    odd = {"a": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(5, dtype=torch.float64), "c": torch.zeros(7).half()}
    files.write_synced(tmp_path / "t", safetensors_parts(odd))
    data = (tmp_path / "t").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert size % 8 == 0
    assert [header[name]["data_offsets"][0] % tensor.element_size() for name, tensor in odd.items()] == [0, 0, 0]


def test_all_is_durable_before_it_has_a_name_and_the_name_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of fsync and rename, which a kill does not test and a power cut does."""
    store = CheckpointStore(tmp_path, keep_last=1)
    save(store, 1)
    calls: list[str] = []
    fsync, replace, rmtree = os.fsync, os.replace, shutil.rmtree

    def traced_fsync(descriptor: int) -> None:
        calls.append("fsync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path).as_posix())
        fsync(descriptor)

    def traced_replace(old: Path, new: Path) -> None:
        calls.append(f"rename {old.name} {new.name}")
        replace(old, new)

    def traced_rmtree(path: Path, **options: object) -> None:
        calls.append(f"delete {path.name}")
        rmtree(path)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "replace", traced_replace)
    monkeypatch.setattr(shutil, "rmtree", traced_rmtree)
    save(store, 2)
    aside, deleted = ".aside-step-00000002", ".aside-deleted-step-00000001"
    assert calls == [
        *[f"fsync {aside}/{name}" for name in FILES],
        f"fsync {aside}",
        f"rename {aside} step-00000002",
        "fsync .",
        f"rename step-00000001 {deleted}",
        "fsync .",
        f"delete {deleted}",
    ]


def test_a_dtype_that_safetensors_lacks_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with pytest.raises(TypeError, match=r"'z' has dtype torch\.complex128"):
        store.save(1, {"model": {"z": torch.zeros(2, dtype=torch.complex128)}}, {})
    assert names(tmp_path) == []


def test_writing_takes_no_memory_of_the_size_of_the_tensors(tmp_path: Path) -> None:
    tensors = {"model": {"w": torch.ones(1 << 24), "v": torch.ones(1 << 24)}}  # 2 x 64 MiB
    store = CheckpointStore(tmp_path)
    tracemalloc.start()
    try:
        store.save(1, tensors, {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.25 * files.CHUNK  # the buffer of the verification, 16 MiB


STATES = [math.pi, 0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0, 2**63, [1, [2.5, None]], "ü\n", {"a": {"b": True}}]


@pytest.mark.parametrize("value", STATES)
def test_state_reads_back_exactly(tmp_path: Path, value: object) -> None:
    store = CheckpointStore(tmp_path)
    back = store.save(1, {}, {"value": value, "limit": math.inf, "loss": math.nan}).checkpoint.state()
    assert repr(back["value"]) == repr(value)
    assert back["limit"] == math.inf
    assert math.isnan(back["loss"])


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, torch.tensor(1.0), b"x"])
def test_state_that_json_would_change_is_an_error(tmp_path: Path, value: object) -> None:
    store = CheckpointStore(tmp_path)
    with pytest.raises(TypeError, match=r"state\['deep'\]\[0\]"):
        store.save(1, {}, {"deep": [value]})
    with pytest.raises(TypeError, match=r"state\['deep'\]\[0\]"):
        store.save_async(1, {}, {"deep": [value]})
    assert names(tmp_path) == []


# ------------------------------------------------------------------------------------------------------- in background


class Gate:
    """A fault that holds the writer at one point until it is opened."""

    def __init__(self, point: str):
        self.point, self.reached, self.open = point, threading.Event(), threading.Event()

    def __call__(self, point: str) -> None:
        if point == self.point:
            self.reached.set()
            assert self.open.wait(20)


def test_changes_after_save_async_do_not_reach_the_file(tmp_path: Path) -> None:
    gate = Gate("create")
    store = CheckpointStore(tmp_path, fault=gate)
    numbers = [1]
    tensors, state = tensors_of(3), {"step": 3, "lr": 0.1 * 3, "list": numbers}
    store.save_async(3, tensors, state)
    assert gate.reached.wait(20)
    for group in tensors.values():
        for tensor in group.values():
            tensor.zero_()
    numbers.append(2)
    gate.open.set()
    store.wait()
    checkpoint = store.latest().checkpoint
    assert torch.equal(checkpoint.tensors("model")["w"], tensors_of(3)["model"]["w"])
    assert checkpoint.tensors("optimizer")["step"].item() == 3
    assert checkpoint.state()["list"] == [1]


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    gate = Gate("fsync model.safetensors")
    store = CheckpointStore(tmp_path, fault=gate)
    store.save_async(1, tensors_of(1), {"step": 1, "lr": 0.1})
    assert gate.reached.wait(20)
    assert store.finished() == []
    stalls = []
    second = threading.Thread(
        target=lambda: stalls.append(store.save_async(2, tensors_of(2), {"step": 2, "lr": 0.2})), daemon=True
    )
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert latest(tmp_path).checkpoint is None
    gate.open.set()
    second.join(20)
    store.wait()
    assert stalls[0] > 0.1
    assert [written.checkpoint.step for written in store.finished()] == [1, 2]
    assert_holds(store.latest().checkpoint, 2)


@pytest.mark.parametrize("call", ["wait", "finished", "save", "save_async"])
def test_a_failure_in_the_background_is_raised_once(tmp_path: Path, call: str) -> None:
    fail = [True]

    def fault(point: str) -> None:
        if point == "write model.safetensors" and fail:
            fail.clear()
            raise OSError(errno.ENOSPC, "No space left on device")

    store = CheckpointStore(tmp_path, fault=fault)
    store.save_async(1, tensors_of(1), {"step": 1, "lr": 0.1})
    thread = store._thread
    assert thread is not None
    thread.join(20)
    arguments = (2, tensors_of(2), {"step": 2, "lr": 0.2}) if call.startswith("save") else ()
    with pytest.raises(CheckpointError, match="No space left"):
        getattr(store, call)(*arguments)
    store.wait()
    save(store, 3)
    assert_holds(store.latest().checkpoint, 3)
    assert names(tmp_path) == ["step-00000003"]


# ---------------------------------------------------------------------------------------------------------- what rots


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


DAMAGE: list[tuple[Callable[[Path], None], str, str]] = [
    *[(truncate, name, f"truncated: {name} has") for name in FILES[:3]],
    *[(flip_a_bit, name, f"altered: {name} does not match its SHA-256") for name in FILES[:3]],
    *[(lengthen, name, f"altered: {name} has") for name in FILES[:3]],
    *[(Path.unlink, name, f"missing file: {name}") for name in FILES[:3]],
    (truncate, "manifest.json", "altered: manifest.json"),
    (flip_a_bit, "manifest.json", "altered: manifest.json"),
    (Path.unlink, "manifest.json", "half-written: no manifest.json"),
]


@pytest.mark.parametrize(("damage", "name", "reason"), DAMAGE)
def test_a_damaged_checkpoint_is_rejected_and_the_one_before_used(
    tmp_path: Path, damage: Callable[[Path], None], name: str, reason: str
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1, metric=2.0)
    save(store, 2, metric=1.0)
    damage(tmp_path / "step-00000002" / name)
    found = CheckpointStore(tmp_path).latest()
    assert_holds(found.checkpoint, 1)
    assert [(r.path.name, r.reason.startswith(reason)) for r in found.rejected] == [("step-00000002", True)], found
    assert best(tmp_path).step == 1
    with pytest.raises(CheckpointError):
        verify(tmp_path / "step-00000002")


def test_every_single_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path), 12, metric=2.125)
    path = tmp_path / "step-00000012" / "manifest.json"
    whole = path.read_bytes()
    meaning = json.loads(whole)
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 4
        try:
            same = json.loads(data) == meaning  # a changed space between two tokens may mean the same
        except ValueError:
            same = False
        path.write_bytes(data)
        assert (latest(tmp_path).checkpoint is not None) == same, position


def test_a_renamed_checkpoint_and_another_format_are_rejected(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path), 1)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000009")
    assert latest(tmp_path).rejected[0].reason == "altered: manifest.json is of step 1"
    from hotloop.engine.train import checkpoint

    path = tmp_path / "step-00000009" / "manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["sha256"]
    manifest["format"] = 2
    path.write_text(json.dumps({**manifest, "sha256": checkpoint._digest(manifest)}))
    assert latest(tmp_path).rejected[0].reason == "format 2: this version reads format 1"
    save(CheckpointStore(tmp_path, keep_last=1), 10)  # and what another version wrote is not deleted
    assert names(tmp_path) == ["step-00000009", "step-00000010"]


def test_none_left_is_told_from_none_yet(tmp_path: Path) -> None:
    assert latest(tmp_path / "nowhere") == (None, [])
    save(CheckpointStore(tmp_path), 1)
    truncate(tmp_path / "step-00000001" / "state.json")
    found = latest(tmp_path)
    assert found.checkpoint is None
    assert len(found.rejected) == 1


# ----------------------------------------------------------------------------------------------------------- retention


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2, keep_best=2)
    metrics = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: math.nan, 6: 2.5, 7: 1.0}
    kept = []
    for step, metric in metrics.items():
        save(store, step, metric)
        kept.append([int(name[-8:]) for name in names(tmp_path)])
    # Without a metric, or with NaN, a checkpoint is never among the best; of equals the earlier is.
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 3, 4, 5], [2, 3, 5, 6], [2, 6, 7]]
    assert store.best().step == best(tmp_path).step == 2


def test_a_rejected_checkpoint_does_not_count_and_goes(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2, keep_best=1)
    for step in (1, 2, 3):
        save(store, step, metric=float(10 - step))
    flip_a_bit(tmp_path / "step-00000003" / "model.safetensors")
    store = CheckpointStore(tmp_path, keep_last=2, keep_best=1)
    assert store.latest().checkpoint.step == 2
    save(store, 4, metric=9.0)
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


def test_a_save_ends_the_time_line_of_later_steps(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=3)
    for step in (10, 20, 30):
        save(store, step, metric=float(-step))
    save(store, 15)
    assert names(tmp_path) == ["step-00000010", "step-00000015"]


def test_a_step_saved_again_replaces_the_earlier(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(5, {"model": {"w": torch.zeros(3)}}, {"first": True})
    save(store, 5)
    assert names(tmp_path) == ["step-00000005"]
    assert_holds(store.latest().checkpoint, 5)


@pytest.mark.parametrize("again", [False, True])
def test_nothing_is_deleted_before_the_new_one_reads_back(tmp_path: Path, again: bool) -> None:
    """What lands on the disk differs from what was written (between the rename and the verification)."""
    save(CheckpointStore(tmp_path), 1)
    step = 1 if again else 2

    def fault(point: str) -> None:
        if point == "verify":
            flip_a_bit(tmp_path / f"step-{step:08d}" / "model.safetensors")

    store = CheckpointStore(tmp_path, keep_last=1, fault=fault)
    with pytest.raises(CheckpointError, match=r"does not read back as written, altered: model\.safetensors"):
        store.save(step, tensors_of(2), {})
    assert_holds(latest(tmp_path).checkpoint, 1)
    store._fault = lambda point: None
    save(store, 3)
    assert names(tmp_path) == ["step-00000003"]


def test_keep_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_last = 0"):
        CheckpointStore(tmp_path, keep_last=0)


# ----------------------------------------------------------------------------------------------------------- full disk

DISK_POINTS = [
    "create",
    *[f"{verb} {name}" for name in FILES for verb in ("write", "fsync")],
    "sync folder",
    "rename",
    "replace",
    "sync parent",
]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("point", DISK_POINTS)
def test_a_full_disk_leaves_the_last_good_one(tmp_path: Path, point: str, background: bool) -> None:
    reached: list[str] = []

    def fault(at: str) -> None:
        if at == point and not reached:
            reached.append(at)
            raise OSError(errno.ENOSPC, "No space left on device")

    step = 1 if point == "replace" else 2
    save(CheckpointStore(tmp_path), 1)
    store = CheckpointStore(tmp_path, keep_last=1, fault=fault)
    with pytest.raises(CheckpointError) as caught:
        store.save(step, tensors_of(2), {"step": 2, "lr": 0.2})
    assert reached == [point]
    for part in (str(tmp_path / f"step-{step:08d}"), "No space left on device", "it needs", "are free"):
        assert part in str(caught.value)
    needed = sum(t.nbytes for group in tensors_of(2).values() for t in group.values())
    assert needed <= int(str(caught.value).split("it needs ")[1].split()[0]) < needed + 200
    found = latest(tmp_path)
    assert found.rejected == []
    # A rename that took place and could not be made durable left two good ones.
    assert_holds(found.checkpoint, 2 if point == "sync parent" else 1)
    assert (tmp_path / "step-00000001").is_dir()
    assert not [name for name in names(tmp_path) if name.startswith(files.ASIDE)]
    save(store, 3, background=background)
    assert_holds(latest(tmp_path).checkpoint, 3)
    assert names(tmp_path) == ["step-00000003"]


def test_a_write_that_the_system_refuses(tmp_path: Path) -> None:
    """A real OSError from write(2), by the limit on a file's size."""
    save(CheckpointStore(tmp_path), 1)
    store = CheckpointStore(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            store.save(2, {"model": {"w": torch.zeros(1 << 20)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-00000001"]
    assert_holds(latest(tmp_path).checkpoint, 1)


def test_an_old_one_that_cannot_be_deleted_is_told(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path), 1)

    def fault(point: str) -> None:
        if point == "delete":
            raise OSError(errno.EACCES, "Permission denied")

    with pytest.raises(CheckpointError, match=r"step-00000002 is written and good, .* cannot be deleted.*Permission"):
        save(CheckpointStore(tmp_path, keep_last=1, fault=fault), 2)
    assert_holds(latest(tmp_path).checkpoint, 2)


# --------------------------------------------------------------------------------------------------------------- kills

# One process imports torch and forks a child for each kill, so that a kill costs milliseconds. It reports a line of
# JSON per kill; what must be true is asserted in the tests.
KILLS = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_checkpoint import save
from hotloop.engine.train.checkpoint import CheckpointError, CheckpointStore, latest, verify

work = Path(sys.argv[2])

def prepare(folder, steps):
    base = folder.with_name("base")
    if not base.exists():
        store = CheckpointStore(base, keep_last=3)
        for step in steps:
            save(store, step, metric=float(step))
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)

def broken(path):
    try:
        verify(path)
        return False
    except CheckpointError:
        return True

def describe(folder):
    found = latest(folder)
    c = found.checkpoint
    return {"step": c and c.step, "lr": c and c.state()["lr"], "w": c and c.tensors("model")["w"].sum().item(),
            "rejected": [r.reason for r in found.rejected],
            "broken": [p.name for p in folder.glob("step-*") if broken(p)],
            "steps": sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")),
            "aside": sorted(p.name for p in folder.iterdir() if p.name.startswith("."))}

def child(body):
    pid = os.fork()
    if pid == 0:
        try:
            body()
        finally:
            os._exit(7)
    return pid

def kill_at(folder, before, step, background, unlinks, hard, count):
    prepare(folder, before)
    def body():
        seen = [0]
        def fault(point):
            if seen[0] == count:
                (folder.parent / "point").write_text(point)
                os.kill(os.getpid(), signal.SIGKILL) if hard else os._exit(9)
            seen[0] += 1
        unlink = os.unlink
        def killing_unlink(name, **where):
            fault(f"unlink {name}")
            unlink(name, **where)
        if unlinks:
            os.unlink = killing_unlink
        store = CheckpointStore(folder, keep_last=1, keep_best=0, fault=None if unlinks else fault)
        save(store, step, background=background)
    _, status = os.waitpid(child(body), 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 7:
        return False  # the save came to its end: there is no point number `count`
    ended = os.WTERMSIG(status) == signal.SIGKILL if os.WIFSIGNALED(status) else os.WEXITSTATUS(status) == 9
    after = describe(folder)
    store = CheckpointStore(folder, keep_last=1, keep_best=0)
    opened = describe(folder)
    save(store, step + 1)
    print(json.dumps({"point": (folder.parent / "point").read_text(), "killed": ended, "after": after,
                      "opened": opened, "then": describe(folder)}), flush=True)
    return True

def kill_at_random(folder, trials, seed):
    draw = random.Random(seed)
    for trial in range(trials):
        prepare(folder, [1])
        read, write = os.pipe()
        def body():
            store = CheckpointStore(folder, keep_last=1 + trial % 2, keep_best=trial % 2)
            for step in range(2, 10_000):
                save(store, step, metric=1.0, background=trial % 2 == 1)
                os.write(write, step.to_bytes(4, "little"))
        pid = child(body)
        delay = draw.uniform(0.01, 0.25)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(write)
        done = os.read(read, 1 << 20)
        os.close(read)
        finished = int.from_bytes(done[-4:], "little") if done else 1
        print(json.dumps({"seed": seed, "trial": trial, "delay": delay, "finished": finished,
                          "after": describe(folder)}), flush=True)

request = json.loads(sys.argv[3])
if request["kind"] == "points":
    count = 0
    arguments = [request[name] for name in ("before", "step", "background", "unlinks")]
    while kill_at(work / "c", *arguments, count % 2 == 0, count):
        count += 1
else:
    kill_at_random(work / "c", request["trials"], request["seed"])
"""


def run_kills(tmp_path: Path, **request: object) -> list[dict]:
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(Path(__file__).parent), str(tmp_path), json.dumps(request)],
        capture_output=True, text=True, timeout=280, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def content(step: int) -> tuple[float, float]:
    return 0.1 * step, tensors_of(step)["model"]["w"].sum().item()


def same(report: dict, step: int) -> bool:
    lr, w = content(step)
    return report["step"] == step and report["lr"] == lr and math.isclose(report["w"], w, rel_tol=1e-5)


@pytest.mark.parametrize("background", [False, True])
def test_killed_at_every_point_of_a_save(tmp_path: Path, background: bool) -> None:
    """Steps 1 and 2 exist, 3 is being written, and with keep_last 1 the older ones go."""
    kills = run_kills(tmp_path, kind="points", before=[1, 2], step=3, background=background, unlinks=False)
    points = [kill["point"] for kill in kills]
    expected = [*(point for point in DISK_POINTS if point != "replace"), "verify", "delete", "done"]
    assert list(dict.fromkeys(points)) == [*(["snapshot"] if background else []), *expected]
    assert points.count("delete") == 2
    assert points.count("write model.safetensors") == 5
    renamed = points.index("sync parent")
    for index, kill in enumerate(kills):
        assert kill["killed"], kill
        for moment in ("after", "opened"):
            assert same(kill[moment], 3 if index >= renamed else 2), kill
            assert kill[moment]["rejected"] == kill[moment]["broken"] == [], kill
        assert kill["opened"]["aside"] == [], kill
        assert same(kill["then"], 4)
        assert kill["then"]["steps"] == ["step-00000004"]
    # Half-written files existed at the kills, so that the names' protection was put to the test.
    assert any(kill["after"]["aside"] for kill in kills)


def test_killed_inside_a_deletion(tmp_path: Path) -> None:
    """Between any two files of the older checkpoints: no half-deleted folder has a checkpoint's name."""
    kills = run_kills(tmp_path, kind="points", before=[1, 2], step=3, background=False, unlinks=True)
    assert sorted(kill["point"] for kill in kills) == sorted(f"unlink {name}" for name in FILES * 2)
    for kill in kills:
        assert kill["killed"], kill
        assert same(kill["after"], 3), kill
        assert kill["after"]["broken"] == [], kill
        assert kill["opened"]["aside"] == [], kill


def test_killed_while_a_step_is_saved_again(tmp_path: Path) -> None:
    """Only step 2 exists and is saved again: at one point its name is gone, and opening the store brings it back."""
    kills = run_kills(tmp_path, kind="points", before=[2], step=2, background=False, unlinks=False)
    points = [kill["point"] for kill in kills]
    assert "replace" in points
    for kill in kills:
        assert kill["killed"], kill
        assert same(kill["opened"], 2), kill
        assert kill["opened"]["aside"] == [], kill
        assert kill["opened"]["broken"] == [], kill
        assert kill["after"]["step"] == (None if kill["point"] == "replace" else 2), kill
        assert same(kill["then"], 3)


def check_random_kills(tmp_path: Path, trials: int) -> None:
    seed = random.SystemRandom().randrange(2**32)
    kills = run_kills(tmp_path, kind="random", trials=trials, seed=seed)
    assert len(kills) == trials
    for kill in kills:
        print(kill["trial"], f"killed after {kill['delay']:.3f} s, {kill['finished']} reported, seed {seed}")
        assert kill["after"]["broken"] == [], kill
        assert same(kill["after"], kill["after"]["step"]), kill
        # What was reported as saved is there; one more may have been finished without the report.
        assert kill["after"]["step"] in (kill["finished"], kill["finished"] + 1), kill
    assert max(kill["finished"] for kill in kills) > 1


def test_killed_from_outside_at_random_moments(tmp_path: Path) -> None:
    check_random_kills(tmp_path, 8)


@pytest.mark.slow
def test_killed_from_outside_at_many_random_moments(tmp_path: Path) -> None:
    check_random_kills(tmp_path, 200)


# --------------------------------------------------------------------------------------------------------------- files


def test_an_atomic_file_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "f"
    record = files.write_file(path, "first")
    assert record == files.read_record(path) == files.read_record(path, from_disk=True)
    assert (record.size, path.read_text()) == (5, "first")

    def fail() -> None:
        with files.atomic_writer(path) as writer:
            writer.write(b"second, and then")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "first"
    assert names(tmp_path) == ["f"]
    with files.atomic_writer(path) as writer:
        writer.write(b"sec")
        assert path.read_text() == "first"
        writer.write(b"ond")
        writer.write(memoryview(b""))
    assert path.read_text() == "second"
    assert writer.record == files.read_record(path)


def test_the_hash_is_sha256_across_chunks(tmp_path: Path) -> None:
    import hashlib

    data = random.Random(0).randbytes(2 * files.CHUNK + 123)
    record = files.write_file(tmp_path / "f", data)
    assert record.sha256 == hashlib.sha256(data).hexdigest()
    assert files.read_record(tmp_path / "f") == record
    assert (tmp_path / "f").read_bytes() == data


def test_folders(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c"
    files.make_folder(deep)
    files.make_folder(deep)
    (deep / "file").write_text("x")
    (tmp_path / "a" / (files.ASIDE + "deleted-b")).mkdir()  # of an earlier deletion that was killed
    files.delete_folder(tmp_path / "a" / "b")
    assert names(tmp_path / "a") == []
    (tmp_path / (files.ASIDE + "file")).write_text("half")
    (tmp_path / (files.ASIDE + "folder")).mkdir()
    assert files.delete_leftovers(tmp_path) == [files.ASIDE + "file", files.ASIDE + "folder"]
    assert names(tmp_path) == ["a"]


# ---------------------------------------------------------------------------------------------------------- environment


def test_the_same_environment_loses_nothing() -> None:
    here = environment(backends={"attention": "reference"}, micro_batch=4, world_size=2)
    assert json.loads(json.dumps(here)) == here
    assert guarantee_lost(here, environment(backends={"attention": "reference"}, micro_batch=4, world_size=2)) == []
    assert here["torch"] == torch.__version__
    assert here["threads"] == torch.get_num_threads()
    assert here["instruction_set"]
    assert here["cpu"]


def test_each_difference_says_what_is_lost() -> None:
    here = environment(backends={"attention": "cpu"}, micro_batch=4)
    assert set(CHANGES_BITS) <= set(here)
    for name in CHANGES_BITS:
        (line,) = guarantee_lost({**here, name: "another"}, here)
        assert line.startswith(f"{name}: another -> ")
        assert line.endswith(STILL_HOLDS)
    lines = guarantee_lost(here, environment(backends={"attention": "triton"}, micro_batch=8, world_size=2))
    assert [line.split(" (")[0] for line in lines] == [
        "backends: attention cpu -> attention triton", "micro_batch: 4 -> 8", "world_size: 1 -> 2",
    ]  # fmt: skip
    # An older checkpoint that knew less, and what has no influence on the bits.
    (line,) = guarantee_lost({k: v for k, v in here.items() if k != "threads"}, here)
    assert line.startswith("threads: unknown -> ")
    assert guarantee_lost({**here, "python": "3.8", "platform": "elsewhere", "numpy": "1"}, here) == []
