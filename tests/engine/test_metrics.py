"""Lines of metrics over kills and resumes, scalars on their way to the host, and what is shown of them."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hotloop.engine.config import LogConfig, Recipe, TrainConfig
from hotloop.engine.train import metrics
from hotloop.engine.train.metrics import DeviceMetrics, MetricsLog, read_metrics
from hotloop.engine.train.progress import Progress, format_seconds, format_train

LINE = {
    "kind": "train", "step": 120, "loss": 3.45678, "loss_z": 0.314, "grad_norm": 1.2345, "lr": 9.8e-4, "ms": 142.25,
    "tokens": 8000, "supervised": 7800, "tokens_per_second": 46_100.0, "supervised_per_second": 45_040.0,
    "padding_share": 0.0123, "mfu": 0.312, "memory_mb": 1234.5, "data_wait_ms": 0.4, "skipped": 0, "seconds": 17.0,
}  # fmt: skip


def write_steps(log: MetricsLog, steps: range, scale: float = 1.0) -> None:
    for step in steps:
        log.train(step, loss=scale / step, lr=0.1)
        if step % 5 == 0:
            log.eval(step, loss=scale / step, bits_per_byte=2.0)


def steps_of(path: Path, kind: str) -> list[int]:
    return [line["step"] for line in read_metrics(path) if line["kind"] == kind]


# ------------------------------------------------------------------------------------------------------------ the lines


def test_lines_are_strict_json_and_return_as_they_read_back(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        written = [
            log.train(1, loss=0.1 + 0.2, grad_norm=math.nan, loss_z=-math.inf, skipped=1),
            log.eval(1, loss=2.5, tokens=7),
            log.event(1, "stop", "SIGTERM\nübel"),
        ]
        assert read_metrics(log.path) == written  # every line is there at once, before the log is closed

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == written
    expected = {"kind": "train", "step": 1, "loss": 0.1 + 0.2, "grad_norm": None, "loss_z": None, "skipped": 1}
    assert lines[0] == expected
    assert lines[2] == {"kind": "event", "step": 1, "name": "stop", "message": "SIGTERM\nübel"}


def test_a_new_run_does_not_write_over_an_old_one(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        write_steps(log, range(1, 4))
    before = log.path.read_bytes()
    with pytest.raises(FileExistsError, match=r"metrics\.jsonl belongs to another run"):
        MetricsLog(tmp_path, tensorboard=False)
    assert log.path.read_bytes() == before


def test_lines_after_the_checkpoint_are_superseded(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        write_steps(log, range(1, 13))
        log.event(12, "note", "this happened")
    with MetricsLog(tmp_path, resume_step=8, tensorboard=False) as log:
        write_steps(log, range(9, 16), scale=2.0)
    lines = read_metrics(log.path)
    assert steps_of(log.path, "train") == list(range(1, 16))
    assert steps_of(log.path, "eval") == [5, 10, 15]
    assert [line["loss"] for line in lines if line["kind"] == "train"] == [
        (1.0 if step <= 8 else 2.0) / step for step in range(1, 16)
    ]
    events = [(line["name"], line["message"]) for line in lines if line["kind"] == "event"]
    assert events == [("note", "this happened"), ("metrics_superseded", "5 line(s) of later steps set aside")]
    aside = read_metrics(tmp_path / "metrics.superseded.jsonl")
    assert [(line["kind"], line["step"]) for line in aside] == [
        ("train", 9), ("train", 10), ("eval", 10), ("train", 11), ("train", 12),
    ]  # fmt: skip
    # Again, and to the very beginning (killed before the first checkpoint): the history grows.
    with MetricsLog(tmp_path, resume_step=0, tensorboard=False):
        pass
    assert steps_of(log.path, "train") == steps_of(log.path, "eval") == []
    assert len(read_metrics(tmp_path / "metrics.superseded.jsonl")) == 5 + 15 + 3


def test_a_resume_with_nothing_to_supersede_rewrites_nothing(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        write_steps(log, range(1, 4))
    inode, before = log.path.stat().st_ino, log.path.read_bytes()
    with MetricsLog(tmp_path, resume_step=3, tensorboard=False):
        pass
    assert (log.path.stat().st_ino, log.path.read_bytes()) == (inode, before)
    assert not (tmp_path / "metrics.superseded.jsonl").exists()


def test_a_line_cut_off_at_any_byte_is_repaired(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.train(1, loss=2.0)
        first = log.path.read_bytes()
        log.train(2, loss=1.25)
    whole = log.path.read_bytes()
    for cut in range(len(first) + 1, len(whole)):
        log.path.write_bytes(whole[:cut])
        assert steps_of(log.path, "train") == [1]  # also of a run that is being written
        with MetricsLog(tmp_path, resume_step=1, tensorboard=False) as resumed:
            resumed.train(2, loss=1.5)
        lines = [json.loads(line) for line in log.path.read_text().splitlines()]
        assert [line.get("loss") for line in lines if line["kind"] == "train"] == [2.0, 1.5], cut
        assert [line["message"] for line in lines if line["kind"] == "event"] == ["1 unreadable line(s) set aside"]
        history = (tmp_path / "metrics.superseded.jsonl").read_bytes()
        assert history.endswith(whole[len(first) : cut].rstrip(b"\n") + b"\n")


def test_a_kill_between_the_two_rewrites_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        write_steps(log, range(1, 10))
    write_file = metrics.write_file

    def killed(path: Path, data: bytes) -> None:
        if path.name == "metrics.jsonl":
            raise KeyboardInterrupt
        write_file(path, data)

    monkeypatch.setattr(metrics, "write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsLog(tmp_path, resume_step=6, tensorboard=False)
    assert steps_of(log.path, "train") == list(range(1, 10))
    monkeypatch.setattr(metrics, "write_file", write_file)
    with MetricsLog(tmp_path, resume_step=6, tensorboard=False):
        pass
    assert steps_of(log.path, "train") == list(range(1, 7))
    assert steps_of(tmp_path / "metrics.superseded.jsonl", "train") == [7, 8, 9]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path) as log:
        write_steps(log, range(1, 13))
    with MetricsLog(tmp_path, resume_step=8) as log:
        write_steps(log, range(9, 16), scale=2.0)
        log.event(15, "stop", "SIGTERM")
    shown = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    shown.Reload()
    scalars = shown.Scalars("train/loss")
    assert [scalar.step for scalar in scalars] == list(range(1, 16))
    for scalar in scalars:
        assert scalar.value == pytest.approx((1.0 if scalar.step <= 8 else 2.0) / scalar.step)
    assert [scalar.step for scalar in shown.Scalars("eval/bits_per_byte")] == [5, 10, 15]
    assert "event/stop/text_summary" in shown.Tags()["tensors"]


# ------------------------------------------------------------------------------------------------------ from the device


def test_scalars_are_those_of_their_step_and_exact() -> None:
    pending = DeviceMetrics()
    loss, count, flag = torch.tensor(0.1), torch.tensor(2**53 - 1), torch.tensor([True])
    pending.push(1, {"loss": loss, "count": count, "flag": flag}, lr=0.3, note="a")
    loss.fill_(7.0)
    count.zero_()
    flag.zero_()
    pending.push(2, {"loss": loss.requires_grad_()}, lr=0.2)
    one, two = pending.drain()
    assert one == {"step": 1, "loss": torch.tensor(0.1).item(), "count": 2**53 - 1, "flag": 1.0, "lr": 0.3, "note": "a"}
    assert two == {"step": 2, "loss": 7.0, "lr": 0.2}
    assert len(pending) == 0
    assert pending.drain(block=True) == []


def test_drain_hands_out_a_fixed_number_of_steps_late() -> None:
    pending = DeviceMetrics()
    late = []
    for step in range(1, 7):
        pending.push(step, {"loss": torch.tensor(float(step))})
        late.append([line["step"] for line in pending.drain(block=True, keep=2)])
    assert late == [[], [], [1], [2], [3], [4]]
    assert [line["loss"] for line in pending.drain(block=True)] == [5.0, 6.0]


class FakeEvent:
    """Stands for torch.cuda.Event, so that the order of arrival can be tested without a GPU."""

    def __init__(self) -> None:
        self.arrived = self.waited = False

    def query(self) -> bool:
        return self.arrived

    def synchronize(self) -> None:
        self.waited = True


def test_steps_leave_in_order_as_their_copies_arrive() -> None:
    pending = DeviceMetrics()
    events = [FakeEvent() for _ in range(4)]
    for step, event in enumerate(events, start=1):
        pending.push(step, {"loss": torch.tensor(float(step))})
        pending._pending[-1].copied = event
    assert pending.drain() == []
    events[1].arrived = True  # of step 2: step 1 still holds it back
    assert pending.drain() == []
    events[0].arrived = True
    assert [line["step"] for line in pending.drain()] == [1, 2]
    assert [line["step"] for line in pending.drain(block=True, keep=1)] == [3]
    assert [event.waited for event in events] == [False, False, True, False]
    assert [line["step"] for line in pending.drain(block=True)] == [4]


# -------------------------------------------------------------------------------------------------------- what is shown


def recipe(steps: int, every: int) -> Recipe:
    return replace(Recipe(), train=TrainConfig(steps=steps), log=LogConfig(every=every))


def test_a_step_in_one_line() -> None:
    assert format_train(LINE, 2000, eta=252.4) == (
        "step  120/2000  loss 3.4568 (z +0.31)  grad 1.234  lr 9.80e-04  142.2 ms  46.1k tok/s (45.0k supervised)  "
        "pad 1.2%  MFU 31.2%  mem 1,234 MB  data 0.3%  ETA 4:12"
    )
    skipped = {**LINE, "loss": None, "loss_z": None, "grad_norm": None, "mfu": None, "skipped": 1}
    text = format_train(skipped, 2000)
    assert "loss nan  grad nan" in text
    assert "MFU" not in text
    assert text.endswith("data 0.3%  SKIPPED")


def test_seconds() -> None:
    shown = [format_seconds(s) for s in (None, math.inf, 0.0, 9.94, 59.6, 61, 3599, 3600, 90_061)]
    assert shown == ["?", "?", "0.0 s", "9.9 s", "1:00", "1:01", "59:59", "1:00:00", "25:01:01"]


def test_a_log_gets_plain_lines_of_the_first_the_nth_and_the_last_step(tmp_path: Path) -> None:
    stream, path = io.StringIO(), tmp_path / "log.txt"
    with Progress(recipe(13, 5), stream=stream, start_step=2, log=path) as progress:
        for step in range(3, 14):
            progress.train({**LINE, "step": step, "ms": 1000.0 if step != 8 else 90_000.0})
            if step == 10:
                progress.eval({"step": 10, "loss": 2.0, "bits_per_byte": 1.5, "tokens": 65536, "seconds": 3.21})
                progress.event({"step": 10, "name": "checkpoint", "message": "[bold]written[/bold]"})
    lines = stream.getvalue().splitlines()
    assert path.read_text().splitlines() == lines
    assert [line.split("/")[0] for line in lines] == ["step  3", "step  5", "step 10", "step 10", "step 10", "step 13"]
    assert lines[3] == "step 10/13  held out: loss 2.0000  1.5000 bits/byte  65,536 tokens in 3.2 s"
    assert lines[4] == "step 10/13  checkpoint: [bold]written[/bold]"
    assert lines[1].endswith("ETA 8.0 s")
    assert lines[2].endswith("ETA 3.0 s")  # one slow step does not move it
    assert "\x1b" not in stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_too() -> None:
    stream = Terminal()
    with Progress(recipe(100, 50), stream=stream) as progress:
        for step in range(1, 101):
            progress.train({**LINE, "step": step})
        progress.say("the [bold]end[/bold]")
    text = stream.getvalue()
    assert "\x1b[" in text
    assert "100/100" in text
    assert "the [bold]end[/bold]" in text
    assert text.count("tok/s") == 3


def test_other_ranks_show_nothing(tmp_path: Path) -> None:
    stream = Terminal()
    with Progress(recipe(10, 1), enabled=False, stream=stream, log=tmp_path / "log.txt") as progress:
        progress.train({**LINE, "step": 1})
        progress.say("hello")
    assert stream.getvalue() == ""
    assert not (tmp_path / "log.txt").exists()
