"""config lists the shipped configs, prints one, and prints what one changes."""

import json

import pytest

from dalle_jax import __main__
from dalle_jax import config as cfg


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder and returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        assert __main__.main(["config", *arguments]) == 0
        return capsys.readouterr().out

    return run


def test_without_arguments_it_lists_every_config_with_its_sizes(printed):
    text = printed()
    assert "dalle\n    DALL-E (Ramesh et al. 2021, arXiv:2102.12092)" in text
    assert f"size={', '.join(cfg.sizes('dalle'))}" in text
    configs = json.loads(printed("--json"))
    assert list(configs) == cfg.shipped() and all(c["about"] for c in configs.values())
    assert configs["dalle"]["sizes"] == cfg.sizes("dalle") and not configs["base"]["sizes"]


def test_every_field_has_a_line_with_its_value(printed):
    flat = cfg.flatten(cfg.load("dalle:size=emoji"))
    lines = printed("dalle:size=emoji", "--config.model.width=32").splitlines()
    values = dict(line.split("  #")[0].rstrip().split(" = ", 1) for line in lines if line)
    assert values.keys() == flat.keys()
    assert values["model.width"] == "32" and values["data.source"] == "'emoji'"


def test_comments_come_from_base_the_file_and_what_it_starts_from(printed):
    lines = dict(line.split(" = ", 1) for line in printed("prior_ar").splitlines() if line)
    assert lines["data.split"] == "'train'", "the source has no comment"
    assert lines["optim.clip_norm"].endswith("# 0 = off"), "of base"
    assert lines["model.num_buckets"].endswith("# 0 = the PCA's"), "of prior_ar"
    assert lines["stages.clip"].endswith("# workdir of the CLIP: required"), "of prior_diffusion"


def test_a_file_of_ones_own_is_printed_with_the_comments_of_its_start(printed, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dalle_jax import config as cfg\n"
        "def get_config(arg=None):\n"
        "    c = cfg.start_from('prior_ar:size=smoke')\n"
        "    c.extra = cfg.ConfigDict(dict(\n"
        "        width=1,  # of one's own\n"
        "    ))\n"
        "    return c\n"
    )
    lines = printed("mine.py").splitlines()
    assert "extra.width = 1  # of one's own" in lines
    assert [line.split("  #")[1] for line in lines if line.startswith("stages.clip =")] == [
        " workdir of the CLIP: required"
    ]


def test_diff_has_only_what_changes(printed):
    changes = cfg.differences(cfg.load("base"), cfg.load("dalle:size=emoji"))
    lines = printed("dalle:size=emoji", "--diff").splitlines()
    assert [line.split(" = ")[0] for line in lines] == list(changes)
    assert [" ".join(line.split()) for line in lines if line.startswith("data.batch")] == [
        "data.batch = 16 # base: 32"
    ]
    assert any(line.startswith("model.width") and "base: absent" in line for line in lines)
    both = json.loads(printed("dalle:size=emoji", "dalle:size=emoji_demo", "--json"))
    assert both == {
        "optim.ema_decay": [0.99, 0.998],
        "stages.dvae_config": ["configs/dvae.py:size=emoji_demo", "configs/dvae.py:size=emoji"],
        "train.preview_every_steps": [0, 1000],
        "train.steps": [1400, 8000],
    }
    assert printed("base", "--diff") == "base equals base.\n"


def test_json_is_the_config(printed):
    text = printed("clip:size=l14", "--json")
    assert cfg.differences(cfg.from_json(text), cfg.load("clip:size=l14")) == {}


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--diff"], "there is no config to print"),
        (["--config.seed=1"], "there is no config to print"),
        (["dale"], "did you mean 'dalle'"),
        (["dalle:size=huge"], "use one of smoke, demo"),
        (["dalle", "--config.optim.lrr=1"], "did you mean 'lr'"),
        (["dalle", "dale"], "did you mean 'dalle'"),
    ],
)
def test_bad_input_is_refused(arguments, text, capsys):
    assert __main__.main(["config", *arguments]) == 2
    assert text in capsys.readouterr().err
