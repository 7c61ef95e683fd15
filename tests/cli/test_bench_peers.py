"""bench --against: other projects' versions of the cases, timed in turns with ours."""

import functools
import json
import sys

import pytest

from dalle_jax import __main__
from dalle_jax.benchmarks import cases, measure, peers
from dalle_jax.cli import bench
from dalle_jax.pages.bench import MARKS

# What a command sets for its own process does not outlive a test.
pytestmark = pytest.mark.usefixtures("same_environment")


@pytest.fixture
def tiny(monkeypatch):
    """Miniature networks, and peers that only count how often they are called."""
    calls = []

    def build(case, name, config, threads):
        calls.append(name)

        def call():
            calls.append(name)
            sum(range(1_000_000))  # not nothing: its processor time is divided by

        return measure.Case(lambda: call, 8, params=7, flops=lambda: 3e9)

    monkeypatch.setattr(cases, "config_of", functools.partial(cases.config_of, size="smoke"))
    monkeypatch.setattr(peers, "build", build)
    monkeypatch.setattr(measure, "versions", lambda *names: dict.fromkeys(("jax", *names), "1"))
    return calls


def test_calls_take_turns():
    calls = []
    cases_in_turn = [measure.Case(lambda i=i: lambda: calls.append(i), images=1) for i in range(3)]
    results = measure.alternate(cases_in_turn, steps=2, warmup=1)
    assert calls == [0, 1, 2] * 4 and len(results) == 3


def test_json_has_every_peer_and_our_ratio(tiny, capsys):
    words = ("prior_train", "--against=all", "--steps=2", "--warmup=0", "--threads=0", "--json")
    assert __main__.main(["bench", *words]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["against"]) == ["diffusers", "dalle2-pytorch"]
    for found in result["against"].values():
        assert found["gflop"] == 3.0 and found["params"] == 7
        assert found["ratio"] == pytest.approx(result["cpu_s"] / found["cpu_s"], rel=0.01)
    assert tiny.count("diffusers") == 1 + 3  # built, then called first and twice
    assert result["versions"] == dict.fromkeys(("jax", "diffusers", "dalle2-pytorch"), "1")


def test_the_table_has_a_line_for_the_peer(tiny, capsys):
    words = ("prior_train", "--against=diffusers", "--steps=1", "--warmup=0", "--threads=0")
    assert __main__.main(["bench", *words]) == 0
    _, ours, theirs = capsys.readouterr().out.splitlines()
    assert ours.startswith("prior_train") and theirs.startswith("  diffusers: ratio ")


@pytest.mark.parametrize(
    "words, text",
    [
        (("clip_train", "--against=clip"), "unknown for clip_train; choose transformers or all"),
        (("all", "--against=clip"), "choose gpt, dalle-pytorch, dall_e, transformers"),
        (("input", "--source=shapes", "--against=all"), "--against applies to dalle_train and"),
        (("all", "--against=gpt", "--docs=page.md"), "a line <!-- peers: begin -->"),
    ],
)
def test_what_cannot_be_is_refused(words, text, capsys):
    assert __main__.main(["bench", *words]) == 2
    assert text in capsys.readouterr().err


def test_what_is_missing_is_named_with_the_way_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(cases, "config_of", functools.partial(cases.config_of, size="smoke"))
    assert __main__.main(["bench", "clip_train", "--against=transformers", "--threads=0"]) == 2
    err = capsys.readouterr().err
    assert "torch" in err and "pip install torch diffusers" in err


@pytest.mark.parametrize("name", ["all", "diffusers"])
def test_all_writes_pairs_into_a_page(name, monkeypatch, tmp_path, capsys):
    numbers = {"cpu_s": 1.5, "gflop": 3.0, "params": 1, "images_per_s": 1, "median_s": 1}
    numbers |= {"peak_rss_mib": 1, "first_call_s": 1, "batch": 8, "threads": 1, "steps": 2}
    started = []

    def start(*words):
        started.append(words)
        names = peers.NAMES[words[1]] if name == "all" else [name]
        against = {peer: numbers | {"ratio": 0.5} for peer in names}
        result = numbers | {"case": words[1], "device": "abacus", "against": against}
        return 0, json.dumps(result | {"versions": dict.fromkeys(names, "2")})

    monkeypatch.setattr(bench, "run_command", start)
    begin, end = MARKS[True]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    assert __main__.main(["bench", "all", f"--against={name}", f"--docs={page}"]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith(f"{end}\nafter\n") and "old" not in text
    run = [case for case, *_ in bench.RUNS if name == "all" or name in peers.NAMES[case]]
    assert [words[1] for words in started] == run
    pairs = sum(len(peers.NAMES[case]) if name == "all" else 1 for case in run)
    assert text.count("| 0.50 |") == pairs and "diffusers 2" in text


# The projects themselves: bench --against says how to get them.
@pytest.mark.slow
@pytest.mark.parametrize(("case", "name"), [(c, n) for c in peers.NAMES for n in peers.NAMES[c]])
@pytest.mark.filterwarnings("default")
def test_a_peer_does_the_case_in_miniature(case, name):
    pytest.importorskip("torch")
    attentions = ("full", "axial", "conv") if case == "dalle_train" else ("",)
    for attention in attentions:
        config = cases.config_of(case, attention=attention, size="smoke")
        peer_case = peers.build(case, name, config, 1)
        call = peer_case.compile()
        first, second = call(), call()
        assert (
            peer_case.images == config.data.batch
            and peer_case.params > 10_000
            and peer_case.flops() > 0
        )
        if case.endswith("_train"):
            assert first != second  # it learned
