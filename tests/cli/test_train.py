"""The train command and its entry point: flags, exit codes, the tokenizer that travels along."""

import collections
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from dalle_jax import __main__, tasks
from dalle_jax.cli import _flags
from dalle_jax.data import pipeline, tokenizers
from dalle_jax.engine import checkpoint, meshes

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "engine"))

import linear_task as lt  # noqa: E402

from dalle_jax.stages import run  # noqa: E402

identity_files = run.identity_files  # `run` is a local name here


class Pipeline(lt.Batches):
    skipped, truncated, num_examples = collections.Counter(), 0, 16
    kill_at = None

    def __call__(self, step):
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__(step) | {"text": np.zeros((16, 1), np.float32)}

    def close(self):
        pass


@pytest.fixture
def command(monkeypatch, workdir, tmp_path):
    """Runs `train` on the linear task; extra arguments are appended."""
    module = types.SimpleNamespace()

    def make(config, read_tokenizer=None, *, shapes_only=False):
        """A task that reads text (and keeps its tokenizer) where the seed is 7."""
        if config.seed != 7:
            return lt.make_task()
        module.tokenizer = read_tokenizer()
        task = lt.make_task(keeps={checkpoint.TOKENIZER: module.tokenizer.model_bytes})
        text = jax.ShapeDtypeStruct((16, 1), "float32")
        return dataclasses.replace(task, batch_spec={**task.batch_spec, "text": text})

    module.make = make
    monkeypatch.setitem(tasks.TASKS, "linear", module)
    pipelines = []
    one = jax.devices()[:1]  # eight compile ten times as long
    monkeypatch.setattr(jax, "devices", lambda *args: one)

    def make_pipeline(data_config, seed, **kwargs):
        pipelines.append(kwargs)
        return Pipeline(delay=0.01)

    monkeypatch.setattr(pipeline, "make", make_pipeline)
    file = tmp_path / "config.py"
    file.write_text(
        "import linear_task as lt\n"
        "from dalle_jax import config as cfg\n"
        "def get_config(arg=None):\n"
        "    c = lt.make_config()\n"
        "    c.unlock()\n"
        "    c.data.split, c.data.eval_split = 'train', 'validation'\n"
        "    return c\n"
    )

    def run(*args):
        flags = ["train", f"--config={file}", f"--workdir={workdir}", "--compilation_cache="]
        return __main__.main([*flags, *args])

    run.pipelines, run.module = pipelines, module
    return run


def test_trains_with_typed_overrides_then_is_a_no_op(command, workdir, capsys):
    assert command("--config.train.steps=8", "--config.optim.lr", "0.01") == 0
    stored = checkpoint.load_config(str(workdir))
    assert stored.train.steps == 8 and stored.optim.lr == 0.01
    assert checkpoint.steps(str(workdir))[-1] == 8
    fields = [(p["split"], p["training"], p["batch"], p["fields"]) for p in command.pipelines]
    assert fields == [("train", True, 16, {"x", "y"}), ("validation", False, 16, {"x", "y"})]
    assert all(p["tokenizer"] is None for p in command.pipelines)
    assert command("--config.train.steps=8", "--config.optim.lr=0.01") == 0
    assert "nothing to do" in capsys.readouterr().out


def test_the_mesh_is_made_once(command, monkeypatch, capsys):
    calls, make_mesh = [], meshes.make_mesh

    def count(*args):
        calls.append(args)
        return make_mesh(*args)

    monkeypatch.setattr(meshes, "make_mesh", count)
    assert command("--dry_run") == 0 and len(calls) == 1
    assert command("--config.train.steps=2") == 0 and len(calls) == 2


def test_sigterm_saves_and_exits_with_143(command, workdir, monkeypatch, capsys):
    monkeypatch.setattr(Pipeline, "kill_at", 6)
    assert command() == 143
    step = checkpoint.steps(str(workdir))[-1]
    assert 0 < step < 20 and f"saved step {step}" in capsys.readouterr().err


def test_dry_run_writes_nothing(command, workdir, capsys):
    assert command("--dry_run") == 0
    out = capsys.readouterr().out
    assert "144 parameters" in out and "learning rate (constant)" in out
    assert not workdir.exists() and command.pipelines == []


def test_the_12b_model_is_looked_at_without_codec_data_or_tokenizer(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = ["train", "--config=configs/dalle_12b.py", "--workdir=nowhere", "--dry_run"]
    assert __main__.main([*argv, "--config.mesh.fsdp=8", "--compilation_cache="]) == 0
    out = capsys.readouterr().out
    assert "12,292,808,448 parameters" in out and "fsdp=8" in out
    assert not (ROOT / "nowhere").exists()


def test_the_workdirs_own_tokenizer_is_used_on_resume(command, workdir, monkeypatch):
    captions = ["a red square", "a blue circle on the left of a green square"] * 20
    path = workdir.parent / "set.model"
    tokenizers.train(captions, 320, path)
    monkeypatch.setattr(tokenizers, "find", lambda c: tokenizers.Tokenizer(path.read_bytes()))
    text = ("--config.seed=7", "--config.train.steps=2")
    assert command(*text) == 0
    copied = (workdir / "tokenizer.model").read_bytes()
    assert copied == path.read_bytes()

    def lost(config):
        raise AssertionError("the prepared set must not be asked")

    monkeypatch.setattr(tokenizers, "find", lost)
    assert command(*text, "--config.train.steps=3") == 0
    assert command.module.tokenizer.model_bytes == copied


def test_a_refused_start_leaves_another_runs_workdir_as_it_was(
    command, workdir, monkeypatch, capsys
):
    assert command() == 0
    other = checkpoint.load_config(str(workdir))
    other.task = "clip"  # the folder of another network
    checkpoint.save_config(str(workdir), other)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    found = tokenizers.train(["a red square", "a blue circle"] * 20, 320, None)
    monkeypatch.setattr(tokenizers, "find", lambda config: found)
    assert command("--config.seed=7") == 2  # a task with text
    assert "task: stored 'clip', given 'linear'" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_a_refused_first_start_does_not_bind_the_next(command):
    assert command("--config.optim.lr=-1") == 2
    assert command("--config.optim.lr=0.01") == 0


@pytest.mark.parametrize(
    "args, text",
    [
        (["train", "--config=nowhere.py", "--workdir=w"], "nowhere.py does not exist"),
        (["trian"], "did you mean 'train'"),
        (["train", "--config=configs/dvae.py", "--workdir=w", "--config.optim.l=1"], "optim.l"),
        (["train", "--config=configs/dvae.py", "--workdir=w", "--config.optim.lr"], "no value"),
        (["train", "--config=configs/dvae.py", "--workdir=w", "--config.task=gan"], "'gan'"),
        (["train", "--config=configs/dvae.py", "--workdir=w", "--process_id=0"], "belong together"),
        (["sample", "--pretrained=shapes", "--prompt=x", "--process_count=2"], "belong together"),
    ],
)
def test_bad_input_is_exit_code_2_with_the_cure(args, text, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert __main__.main([*args]) == 2
    err = capsys.readouterr().err
    assert text in err and "Traceback" not in err


def test_unknown_flag_is_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(["train", "--wordkir=x"])
    assert stop.value.code == 2


def test_ctrl_c_is_exit_code_130(monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(_flags, "load_config", interrupt)
    argv = ["train", "--config=x", "--workdir=y", "--compilation_cache="]
    assert __main__.main(argv) == 130


def test_overview_lists_every_command_with_its_summary(capsys):
    assert __main__.main([]) == 0
    out = capsys.readouterr().out
    for file in (ROOT / "dalle_jax" / "cli").glob("*.py"):
        if "\nSUMMARY = " in file.read_text():
            assert f"  {file.stem} " in out


def test_no_help_imports_jax():
    program = """
        import sys
        from dalle_jax import __main__
        for name in __main__.commands():
            try:
                __main__.main([name, "--help"])
            except SystemExit as stop:
                assert stop.code == 0, name
            heavy = {"jax", "numpy", "tensorflow_datasets", "flax"} & sys.modules.keys()
            assert not heavy, (name, heavy)
    """
    import textwrap

    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_overrides_are_split_from_flags():
    rest, overrides = _flags.split_overrides(
        ["--config=a.py", "--config.a.b=1=2", "--workdir", "w", "--config.c", "-3"]
    )
    assert rest == ["--config=a.py", "--workdir", "w"]
    assert overrides == {"a.b": "1=2", "c": "-3"}
