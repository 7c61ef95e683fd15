"""bench: every case in miniature, one compilation, the stated work, clear refusals."""

import functools
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import monitoring

from dalle_jax import __main__
from dalle_jax.benchmarks import cases, measure
from dalle_jax.cli import bench
from dalle_jax.data.builders import shapes
from dalle_jax.models import build, clip, dvae, prior_diffusion, unet
from dalle_jax.pages.bench import MARKS
from dalle_jax.stages import by_shape
from dalle_jax.stages.prior import PriorStage
from dalle_jax.types import UsageError

# What a command sets for its own process does not outlive a test.
pytestmark = pytest.mark.usefixtures("same_environment")

COMPILED = "/jax/core/compile/backend_compile_duration"
FIELDS = {
    "case", "median_s", "cpu_s", "images_per_s", "params", "peak_rss_mib", "first_call_s", "batch",
    "steps", "warmup", "threads", "device", "versions",
}  # fmt: skip


@pytest.fixture
def compilations():
    """A list that grows by one with every program that XLA compiles or loads."""
    events = []

    def heard(event, *_, **__):
        if event == COMPILED:
            events.append(event)

    monitoring.register_event_duration_secs_listener(heard)
    yield events
    monitoring.unregister_event_duration_listener(heard)


@pytest.fixture
def tiny(monkeypatch):
    """The commands run the miniature networks."""
    small = functools.partial(cases.config_of, size="smoke")
    monkeypatch.setattr(cases, "config_of", small)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a set of 60 scenes and no tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    shapes.prepare(str(folder), image_px=16, num_train=60, num_eval=8, seed=0)
    return folder


def run(capsys, *words) -> dict:
    assert __main__.main(["bench", *words, "--json", "--threads=0"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("name", cases.NETWORKS)
def test_every_case_compiles_once_and_then_only_runs(name, compilations):
    case = cases.make(name, cases.config_of(name, size="smoke"))
    del compilations[:]
    call = case.compile()
    call()
    if name.endswith("_sample"):
        assert compilations
    else:
        assert len(compilations) == 1
    del compilations[:]
    for _ in range(3):
        call()
    assert not compilations
    assert case.params > 10_000 and case.images == 8


def test_a_training_step_trains():
    call = cases.make("dvae_train", cases.config_of("dvae_train", size="smoke")).compile()
    losses = [call() for _ in range(8)]
    assert losses[-1] < losses[0]


def test_a_loss_that_is_not_finite_is_no_result():
    changes = {"optim.lr": 1e30}
    config = cases.config_of("dvae_train", size="smoke", changes=changes)
    call = cases.make("dvae_train", config).compile()
    with pytest.raises(FloatingPointError, match="loss of autoencode is"):
        for _ in range(5):
            call()


@pytest.mark.parametrize("shared", [False, True])
def test_prompts_or_candidates_of_one(shared):
    config = cases.config_of("dalle_sample", size="smoke", changes={"data.batch": 3})
    case = cases.make("dalle_sample", config, shared_prompt=shared)
    codes = case.compile()()
    assert codes.shape == ((1, 3, 64) if shared else (3, 1, 64))
    assert (case.images, case.tokens) == (3, 3 * 64)
    assert len(np.unique(codes.reshape(3, 64), axis=0)) == 3


@pytest.mark.parametrize("attention, kinds", [("axial", "rcrr"), ("conv", "cccc"), ("", "ffff")])
def test_the_pattern_has_no_exception_at_the_end(attention, kinds):
    config = cases.config_of("dalle_train", attention=attention)
    masks = build.dalle(config, 16, 1024).config.layer_masks()
    assert "".join(mask.kind[0] for mask in masks) == kinds * 2
    assert {mask.kernel for mask in masks} == {5}


def test_the_dalle_is_the_stated_one():
    """Parameters by hand: 8 layers of D = 256, F = 1,024, with biases and two layer norms."""
    config = cases.config_of("dalle_train")
    d, f, v = 256, 1024, 1024
    block = 4 * d * d + 3 * d * f + (5 * d + 2 * f) + 4 * d
    tables = (v + 64) + 64 + v + 16 + 16  # text and its padding, position, codes, row, column
    expected = 8 * block + d * tables + 2 * d + 2 * d * v
    text = jax.ShapeDtypeStruct((1, 64), "int32")
    codes = jax.ShapeDtypeStruct((1, 256), "int32")
    model = build.dalle(config, 16, v)
    variables = jax.eval_shape(model.init, jax.random.key(0), text, codes)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == expected


def test_the_dvae_does_the_work_of_three_strided_convolutions():
    """Multiply-adds of DALLE-pytorch's DiscreteVAE: num_layers=3, hidden_dim=64, codebook 256."""
    d, v, e = 64, 1024, 256
    block = 8**2 * (9 * d * d + 9 * d * d + d * d)
    encoder = 32**2 * 16 * 3 * d + (16**2 + 8**2) * 16 * d * d + block + 8**2 * d * v
    decoder = 8**2 * (v * e + e * d) + block
    decoder += (8**2 + 16**2 + 32**2) * 16 * d * d + 64**2 * d * 3  # transposed: per input
    config = cases.config_of("dvae_train")
    c = build.autoencoder(config).config
    assert c.grid == 8 and c.num_codes == v and c.num_blocks == 1
    assert dvae.forward_macs(c) / (encoder + decoder) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    "name, batch",
    [("dalle_train", 8), ("dalle_sample", 1), ("dvae_train", 16), ("dvae_codec", 2),
     ("clip_train", 64), ("clip_score", 16), ("prior_train", 64), ("prior_sample", 8),
     ("unet_train", 8)],
)  # fmt: skip
def test_the_batch_of_a_case(name, batch):
    config = cases.config_of(name)
    assert config.data.batch == batch and config.dtype.compute == "float32"
    assert not config.optim.ema_decay and config.optim.name == "adamw"


def test_the_prior_and_the_unet_are_the_stated_ones():
    """Multiply-adds by hand; the CLIP in front is less than 1 % of either."""
    d, positions = 256, 36
    config = cases.config_of("prior_train")
    stage = by_shape.clip(config)
    c = PriorStage.build(config, stage, None).config
    layer = positions * 12 * d * d + d * positions * (positions + 1)
    last = positions * 2 * d * d + 10 * d * d  # keys and values of all, the rest of the query
    ends = 2 * d * d + 3 * d * d  # time; both embeddings, the output
    assert (c.length, c.transformer.num_layers, c.transformer.num_heads) == (positions, 6, 8)
    assert prior_diffusion.flops(c) == pytest.approx(2 * (5 * layer + last + ends), rel=0.01)
    assert clip.flops(stage.model.config) < 0.01 * prior_diffusion.flops(c)

    c = build.unet(cases.config_of("unet_train"), 256).config
    assert (c.width, c.channel_mults, c.num_blocks) == (64, (1, 2, 4), 2)
    assert c.clip_tokens == 4 and not c.text_encoder and c.patch_px == 1
    assert clip.flops(stage.model.config) < 0.01 * unet.flops(c, 32)


def test_json_of_a_network(tiny, capsys):
    words = ("dalle_train", "--attention=axial", "--batch=2", "--steps=2", "--warmup=0")
    result = run(capsys, *words)
    assert result.keys() == FIELDS | {"attention", "tokens_per_s", "gflop", "gflop_per_cpu_s"}
    rate = result["gflop"] / result["cpu_s"]
    assert result["gflop_per_cpu_s"] == pytest.approx(rate, rel=0.01) and result["gflop"] > 0
    assert result["attention"] == "axial" and (result["batch"], result["steps"]) == (2, 2)
    assert result["images_per_s"] == pytest.approx(2 / result["median_s"], rel=0.05)
    assert result["tokens_per_s"] == pytest.approx((24 + 64) * result["images_per_s"], rel=0.01)
    assert result["first_call_s"] > result["median_s"] > 0 and result["cpu_s"] > 0
    assert {"python", "jax", "jaxlib", "flax", "numpy"} == result["versions"].keys()


def test_attention_implementations_can_be_compared(tiny, capsys):
    words = ("dalle_train", "--attention=conv", "--steps=1", "--warmup=0")
    assert run(capsys, *words, "--attention_impl=dense")["attention_impl"] == "dense"
    assert __main__.main(["bench", *words, "--threads=0", "--attention_impl=dence"]) == 2
    assert "'dence'" in capsys.readouterr().err


def test_json_of_the_input(prepared, capsys):
    words = ("input", "--source=shapes", f"--data_dir={prepared}", "--image_px=16", "--batch=20")
    result = run(capsys, *words)
    assert result.keys() == FIELDS | {"source", "image_px"}
    assert result["params"] == 0 and result["images_per_s"] > 0


def test_input_reads_what_it_says(prepared):
    call = cases.read("shapes", str(prepared), image_px=16, batch=20, threads=1).compile()
    first, second = call(), call()
    assert first["image"].shape == (20, 16, 16, 3) and first.keys() == {"image"}
    assert not np.array_equal(first["image"], second["image"])


def test_input_reads_text_where_there_is_a_tokenizer(prepared):
    path = prepared / "shapes" / "tokenizer-300.model"
    path.write_bytes(b"not a model")
    with pytest.raises(UsageError, match="tokenizer-300"):
        cases.read("shapes", str(prepared), image_px=16, batch=20, threads=1)
    path.unlink()


@pytest.mark.parametrize(
    "words, text",
    [
        (("dale_train",), "no case 'dale_train'; did you mean 'dalle_train'?"),
        (("clip_train", "--attention=full"), "--attention applies to dalle_train and dalle_sample"),
        (("dalle_train", "--shared_prompt"), "--shared_prompt applies to dalle_sample"),
        (("dalle_train", "--attention=axal", "--threads=0"), "use one of full, axial, conv"),
        (("dvae_train", "--source=shapes"), "--source applies to input"),
        (("all", "--batch=3"), "--batch applies to a single case"),
        (("clip_train", "--docs=page.md"), "--docs applies to all, not to clip_train"),
        (("all", "--docs=page.md"), "no place for the table"),
        (("all", "--data_dir=data"), "needs --source"),
        (("clip_train", "--steps=0"), "--steps is 0; expected at least 1"),
        (("clip_train", "--batch=0"), "--batch is 0; expected at least 1"),
        (("input",), "--source=NAME"),
        (("clip_train", "--threads=2"), "--threads=2 comes too late"),
    ],
)
def test_what_cannot_be_is_refused(words, text, capsys):
    assert __main__.main(["bench", *words]) == 2
    assert text in capsys.readouterr().err


def test_a_set_that_is_not_prepared(tmp_path):
    """As a program: its exit code, and that --threads comes in time there."""
    command = [sys.executable, "-m", "dalle_jax", "bench", "input", "--source=shapes"]
    done = subprocess.run([*command, f"--data_dir={tmp_path}"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "python -m dalle_jax prepare shapes" in done.stderr


def test_help_names_every_case(capsys):
    with pytest.raises(SystemExit) as end:
        __main__.main(["bench", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*bench.CASES, "all"))
    assert set(bench.CASES) == {*cases.NETWORKS, "input"}


def test_one_thread_means_one():
    assert bench.thread_environment(0, "--xla_a") == {}
    one = bench.thread_environment(1, "--xla_a")
    assert one["XLA_FLAGS"] == "--xla_a --xla_cpu_multi_thread_eigen=false"
    assert one["OMP_NUM_THREADS"] == one["OPENBLAS_NUM_THREADS"] == one["NPROC"] == "1"
    assert "XLA_FLAGS" not in bench.thread_environment(2, "")


@pytest.mark.parametrize("json_flag", [True, False])
def test_all_runs_every_case_and_tells_what_failed(json_flag, monkeypatch, capsys):
    started = []

    def start(*words):
        started.append(words)
        if words[:2] == ("bench", "clip_score"):
            return 1, ""
        result = dict.fromkeys(FIELDS, 1.5) | {"case": words[1], "params": 1_000}
        return 0, json.dumps(result) + "\n"

    monkeypatch.setattr(bench, "run_command", start)
    flags = ["--json"] if json_flag else []
    assert __main__.main(["bench", "all", "--steps=2", *flags]) == 1
    out, err = capsys.readouterr()
    assert "failed: clip_score" in err
    benched = [words for words in started if words[0] == "bench"]
    assert {words[1] for words in benched} == set(bench.CASES)
    assert all("--steps=2" in words and "--threads=1" in words for words in benched)
    assert [words[0] for words in started].count("prepare") == 1
    lines = out.splitlines()
    if json_flag:
        assert [json.loads(line)["case"] for line in lines] == [
            words[1] for words in benched if words[1] != "clip_score"
        ]
    else:
        assert lines[0].startswith("case") and len(lines) == len(benched)
        assert "1,000" in lines[1]


def test_all_writes_its_table_into_a_page(monkeypatch, capsys, tmp_path):
    def start(*words):
        result = dict.fromkeys(FIELDS, 1.5) | {"case": words[1], "params": 1_000}
        result |= {"versions": {"jax": "0.1"}, "device": "abacus", "gflop": 3.0}
        return 0, json.dumps(result | {"gflop_per_cpu_s": 2.0}) + "\n"

    monkeypatch.setattr(bench, "run_command", start)
    page = tmp_path / "page.md"
    begin, end = MARKS[False]
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    assert __main__.main(["bench", "all", f"--docs={page}"]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\n") and "old" not in text
    assert text.endswith(f"{end}\nafter\n") and "abacus" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(bench.RUNS) + 1
    assert all(line.count("|") == 10 for line in rows)


def test_medians_leave_out_the_first_call_and_the_warmup():
    calls = []
    case = measure.Case(lambda: lambda: calls.append(1), images=1)
    result = measure.measure(case, steps=3, warmup=2)
    assert len(calls) == 1 + 2 + 3
    assert "tokens_per_s" not in result and math.isfinite(result["images_per_s"])
    assert 1 < result["peak_rss_mib"] < 100_000
