"""What is written can be read back, and what is printed says what it means."""

import json

import linear_task as lt
import numpy as np
import pytest

from dalle_jax.engine import console, event_files
from dalle_jax.types import UsageError


def test_events_of_an_interrupted_tail_are_dropped_on_resume(workdir):
    writer = event_files.Writer(str(workdir), lt.make_config())
    for step in (5, 10, 15):
        writer.scalars(step, "train", {"loss": step / 10})
    writer.close()
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 17, "ki')  # killed in the middle of a line
    writer = event_files.Writer(str(workdir), lt.make_config(), first_step=10)
    writer.scalars(15, "train", {"loss": np.float32(0.1)})
    writer.close()
    events = event_files.read(str(workdir))
    assert [e["step"] for e in events] == [5, 10, 15]
    assert np.float32(events[-1]["loss"]) == np.float32(0.1)


def test_nan_is_null_in_json(workdir):
    writer = event_files.Writer(str(workdir), lt.make_config())
    writer.scalars(1, "eval", {"loss": float("nan"), "psnr": float("inf")})
    writer.close()
    line = (workdir / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 1, "kind": "eval", "loss": None, "psnr": None}


def test_tensorboard_gets_scalars_and_pictures(workdir):
    writer = event_files.Writer(str(workdir), lt.make_config(**{"train.tensorboard": True}))
    writer.scalars(1, "train", {"loss": 1.0})
    writer.images(1, {"samples": np.zeros((6, 16, 16, 3), np.float32)})
    writer.close()
    events = list(workdir.glob("events.out*"))
    assert len(events) == 1
    assert b"train/loss" in events[0].read_bytes() and b"preview/samples" in events[0].read_bytes()
    assert (workdir / "previews" / "samples-1.png").exists()


def test_missing_wandb_is_refused_by_name(workdir, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UsageError, match="pip install 'dalle_jax\\[wandb\\]'"):
        event_files.Writer(str(workdir), lt.make_config(**{"train.wandb_project": "p"}))


def test_console_line():
    values = {"loss": 0.123456, "perf/images_per_s": 1234.5, "perf/tflops_per_device": 1.2345}
    values |= {"perf/mfu_pct": 31.27, "perf/input_wait_pct": 3.2, "perf/host_ms": 1.0}
    line = console.step_line(50, 1000, values, 75)
    assert line == (
        "step   50/1000  loss 0.1235 | 1,234 images/s  1.23 TFLOP/s/device  MFU 31.3%  "
        "input wait 3%  ETA 1:15"
    )


def test_units():
    assert console.format_duration(3723) == "1:02:03" and console.format_duration(62) == "1:02"
    assert console.format_bytes(100) == "100 B" and console.format_bytes(3 * 2**20) == "3.0 MiB"
    assert console.format_bytes(5000 * 2**30) == "5000.0 GiB"
