"""report: a page of whatever is there, and a sentence for whatever is not."""

import html.parser
import json

import numpy as np
import pytest

from dalle_jax import __main__, images
from dalle_jax.data import scenes
from dalle_jax.evaluation import judge, shapes

SKILL = {
    "n": 24, "seen": 0.5, "held_out": 0.25, "reconstruction": 0.9,
    "best_of": {"1": 0.4, "8": 0.6, "16": 0.5}, "oracle": {"1": 0.4, "8": 0.8, "16": 0.9},
}  # fmt: skip


class Words(html.parser.HTMLParser):
    """The text of a page, and the number of its pictures and charts."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.images, self.charts = "", 0, 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.images += tag == "img"
        self.charts += ("role", "img") in attributes

    def handle_data(self, data):
        self.text += data


def lines(folder, *events):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def pictures(folder, prompt, rng, **settings):
    place = folder / prompt.replace(" ", "-")
    place.mkdir(parents=True)
    kept = []
    for rank in (1, 2, 3):
        file = place / f"{rank:02d}.png"
        file.write_bytes(images.png_bytes(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)))
        kept.append(dict(rank=rank, candidate=rank, score=0.4 - rank / 10, file=str(file)))
    scores = dict(prompt=prompt, settings=settings, kept=kept, scores=[0.3, 0.2, 0.1, 0.0])
    (place / "scores.json").write_text(json.dumps(scores))
    return kept[0]["file"]


def codec_events():
    for step in range(50, 1100, 50):
        use = dict(codes_used=300 + step / 10, perplexity=100 + step / 20)
        loss = dict(psnr=20 + step / 200, temperature=1 / step, loss=1 / step)
        yield dict(step=step, kind="train", **loss, **use)
    yield dict(step=1050, kind="eval", psnr=26.2, codes_used=478, perplexity=111.4)


@pytest.fixture
def demo(tmp_path, rng):
    """The files of launch/demo.sh, in the small."""
    folder = tmp_path / "demo"
    for name in ("vqvae", "dvae"):
        lines(folder / name, *codec_events())
    steps = range(50, 3000, 50)
    accuracy = dict(recall1_image_to_text=0.4)
    clip = [dict(step=s, kind="train", loss=9 / s, accuracy_image_to_text=s / 3000) for s in steps]
    lines(folder / "clip", *clip, dict(step=2950, kind="eval", loss=0.2, **accuracy))
    dalle = [
        dict(step=s, kind="train", text_loss=1 + 9 / s, image_loss=2 + 9 / s, image_accuracy=0.5)
        for s in steps
    ]
    lines(folder / "dalle", *dalle, {**dalle[-1], "kind": "eval"})
    (folder / "dvae" / "previews").mkdir()
    for step in (50, 1050):
        grid = images.grid(rng.integers(0, 256, (8, 64, 32, 3), dtype=np.uint8), 8, scale=4)
        grid.save(folder / "dvae" / "previews" / f"reconstructions-{step}.png")
    evaluation = dict(
        judge=dict(oracle_accuracy=0.998),
        skills={name: SKILL for name in ("single", "count", "binding", "relation")},
        mean=SKILL,
        seconds_per_picture={"1": 0.03, "8": 0.2, "16": 0.4},
    )
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(evaluation))
    given = pictures(folder / "samples", "a red <cube> on a white background", rng)
    pictures(folder / "samples", "three green crosses on a black background", rng)
    pictures(folder / "completion", "a red cube", rng, image=given, keep_rows=4)
    logs = folder / "logs"
    logs.mkdir()
    for name in ("prepare", "vqvae", "dvae", "clip", "dalle", "evaluate", "samples", "completion"):
        command = f"python -m dalle_jax {name} --prompt=a\\ red\\ cube --out=runs/demo/{name} "
        (logs / f"{name}.done").write_text(f"{command}\n125\n")
    return folder


def report(demo) -> Words:
    assert __main__.main(["report", f"--demo={demo}"]) == 0
    return Words((demo / "index.html").read_text("utf-8"))


def test_the_page_shows_all_of_a_finished_demo(demo):
    page = report(demo)
    assert page.images == 1 + 3 + 3 + 3 + 1  # grid, two prompts, completion and its given picture
    assert page.charts == 2 + 1 + 2 + 3 + 2 + 2
    command = "python -m dalle_jax samples '--prompt=a red cube'"
    words = ("26.2 dB", "478", "40 %", "a red <cube>", "held out", "ceiling", "99.8 %", command)
    for text in (*words, "longer training"):
        assert text in page.text, text
    assert "yet" not in page.text
    numbers = json.loads((demo / "metrics.json").read_text())
    assert numbers["stages"]["dvae"]["eval"]["codes_used"] == 478
    assert numbers["evaluation"]["skills"]["single"]["best_of"]["8"] == 0.6
    assert numbers["seconds"]["dalle"] == 125


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("evaluation", "no evaluation yet"),
        ("samples", "There are no pictures yet"),
        ("completion", "No picture was completed yet"),
        ("clip", "Not trained yet"),
        ("dvae/previews", "No reconstructions yet"),
        ("logs", "ran none in this folder"),
    ],
)
def test_a_sentence_replaces_what_is_missing(demo, missing, sentence):
    (demo / missing).rename(demo / "elsewhere")
    assert sentence in report(demo).text


def test_an_empty_folder_makes_a_page_too(tmp_path):
    assert "Nothing is trained yet" in report(tmp_path).text


def test_damaged_files_do_not_stop_the_page(demo):
    (demo / "evaluation" / "metrics.json").write_text('{"skills": {"sin')
    (demo / "dalle" / "metrics.jsonl").write_text(
        '{"step": 5, "kind": "train", "image_loss": 1}\n{"st'
    )
    (demo / "samples" / "a-red-<cube>-on-a-white-background" / "scores.json").write_text("")
    page = report(demo)
    assert "three green crosses" in page.text and "no evaluation yet" in page.text


def test_a_moved_demo_still_shows_its_pictures(demo):
    there = demo.rename(demo.with_name("moved"))
    assert report(there).images == 1 + 3 + 3 + 3 + 1


def test_other_evaluations_become_a_table(demo):
    (demo / "evaluation" / "metrics.json").write_text(
        '{"recall": {"1": 0.25, "5": 0.5}, "chance": 0.01}'
    )
    assert "recall / 5" in report(demo).text


def test_retrieval_is_a_table_of_directions(demo):
    recall = {"image_to_text": {"1": 0.25, "5": 0.5}, "text_to_image": {"1": 0.125, "5": 0.375}}
    chance = {name: {"1": 0.002, "5": 0.01} for name in recall}
    (demo / "evaluation" / "metrics.json").write_text(
        json.dumps(dict(suite="retrieval", n=499, split="held_out", chance=chance, **recall))
    )
    text = report(demo).text
    assert "text to image" in text and "0.375" in text and "499 pictures" in text
    assert "25 %" in text and "guessing gives 0.2 %" in text  # among the headline figures


def test_a_missing_folder_is_named(tmp_path, capsys):
    assert __main__.main(["report", f"--demo={tmp_path / 'none'}"]) == 2
    assert "launch/demo.sh" in capsys.readouterr().err


SCENE = shapes.make_prompts(1, 0)[0].scene  # of the grammar: the judge can tell


def results(folder, names, rng, **figures):
    """What vary, interpolate, edit and inpaint leave; the last picture shows SCENE."""
    folder.mkdir(parents=True)
    files = [folder / f"{name}.png" for name in names]
    for file in files:
        file.write_bytes(images.png_bytes(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)))
    files[-1].write_bytes(images.png_bytes(scenes.render(SCENE, 32)))
    labels = [f"{file.stem} · 0.777" for file in files]
    shown = dict(files=[str(file) for file in files], labels=labels, **figures)
    return dict(title=f"title of {folder.name}", text="In 2 seconds.", **shown)


@pytest.fixture
def unclip(tmp_path, rng):
    """The files of launch/demo.sh --pipeline=unclip, in the small."""
    folder = tmp_path / "demo"
    steps = range(50, 1000, 50)
    accuracy = dict(recall1_image_to_text=0.4)
    lines(folder / "clip", *(dict(step=s, kind="train", loss=9 / s) for s in steps))
    with (folder / "clip" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(dict(step=950, kind="eval", loss=0.2, **accuracy)) + "\n")
    cosines = dict(cosine=0.81, cosine_text=0.3, cosine_shuffled=0.1)
    retrieval = dict(retrieval1=0.5, retrieval1_text=0.2, retrieval1_chance=0.004)
    train = [dict(step=s, kind="train", loss=9 / s) for s in steps]
    lines(folder / "prior", *train, dict(step=950, kind="eval", loss=0.2, **cosines, **retrieval))
    for name in ("decoder", "inpainter", "upsampler"):
        quarters = {f"mse_q{q}": 1 / q for q in (1, 2, 3, 4)}
        vb = {} if name == "upsampler" else {"vb": 0.01}
        train = [dict(step=s, kind="train", mse=9 / s, **quarters, **vb) for s in steps]
        lines(folder / name, *train, dict(step=950, kind="eval", mse=0.0321, **quarters, **vb))
        grid = images.grid(rng.integers(0, 256, (2, 32, 64, 3), dtype=np.uint8), 2, scale=4)
        (folder / name / "previews").mkdir()
        grid.save(folder / name / "previews" / "own_then_samples-950.png")
    skills = {name: SKILL for name in ("single", "count", "binding", "relation")}
    runs = [
        dict(prior=prior, guidance=scale, skills=skills, mean={**SKILL, "seen": scale / 4}, **more)
        for prior, scale, more in (
            ("diffusion", 1, {}), ("diffusion", 2, {}), ("caption", 1, {}), ("caption", 2, {}),
            ("dalle", 3, dict(temperature=0.9, top_k=0, top_p=0.8)),
        )
    ]  # fmt: skip
    runs[0]["judge"] = dict(oracle_accuracy=0.998)
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(dict(runs=runs)))
    pictures(folder / "samples", "a red <cube>", rng)  # without an upsampler
    place = folder / "samples" / "of-the-grammar"
    place.mkdir()
    for name, px in (("01_small", 16), ("01", 32)):
        (place / f"{name}.png").write_bytes(images.png_bytes(scenes.render(SCENE, px)))
    kept = dict(rank=1, score=0.654, file=f"{place}/01.png", small=f"{place}/01_small.png")
    scores = dict(prompt=SCENE.caption, kept=[kept], scores=[0.654, 0.1])
    (place / "scores.json").write_text(json.dumps(scores))
    asked = {"edited": {"to": SCENE.caption}, "inpainted": {"prompt": "a red <cube>"}}
    for name, names in {
        "variations/room": ["given", "00", "01"],
        "interpolation": ["given_1", "01", "02", "given_2"],
        "edited": ["given", "01", "02"],
        "inpainted": ["given", "masked", "01"],
    }.items():
        result = results(folder / name, names, rng, **asked.get(name, {}))
        written = dict(results=[result], command=f"python -m dalle_jax made --out={name}")
        (folder / name.split("/")[0] / "results.json").write_text(json.dumps(written))
    logs = folder / "logs"
    logs.mkdir()
    for name in ("prepare", "prepare64", "clip", "prior", "decoder", "inpainter", "upsampler"):
        (logs / f"{name}.done").write_text(f"python -m dalle_jax train --workdir={name}\n125\n")
    return folder


def test_a_demo_of_dalle_2_shows_all_six_kinds_of_pictures(unclip):
    page = report(unclip)
    assert page.images == (3 + 1) + 2 + 3 + 4 + 3 + 3 + 3  # and a preview of each U-Net
    # clip (no accuracy while training, but held out), prior, three U-Nets, judge
    assert page.charts == 2 + 3 + (3 + 3 + 2) + (1 + 2)
    for text in (
        "DALL·E 2, from nothing", "after 12 minutes of training", "0.0321", "40%", "0.81",
        "best run: prior diffusion at guidance 2", "50 %", "ceiling 90 %", "99.8 %",
        "a red <cube>", "1 · 0.654 · right", "16 px · 0.654", "32 px · right",
        "00 · 0.777", "01 · 0.777 · wrong", "02 · 0.777 · right", "masked · 0.777",
        "own then samples; step 950", "prepare64: data for the upsampler", "2:05",
        "python -m dalle_jax made --out=variations/room", "top_p 0.8",
    ):  # fmt: skip
        assert text in page.text, text
    assert "yet" not in page.text and "given · 0.777 · wrong" not in page.text
    numbers = json.loads((unclip / "metrics.json").read_text())
    assert numbers["stages"]["decoder"]["eval"]["mse"] == 0.0321
    assert numbers["edited"][0]["right"] == [None, False, True]
    assert [run["prior"] for run in numbers["evaluation"]["runs"]][-1] == "dalle"


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("evaluation", "no evaluation yet"),
        ("samples", "No picture was upsampled yet"),
        ("variations", "There are no variations yet"),
        ("interpolation/results.json", "No pictures were interpolated yet"),
        ("edited", "No picture was edited yet"),
        ("inpainted", "No picture was inpainted yet"),
        ("prior", "Not trained yet"),
        ("logs", "ran none in this folder"),
    ],
)
def test_a_sentence_replaces_what_is_missing_for_dalle_2(unclip, monkeypatch, missing, sentence):
    monkeypatch.setattr(judge, "judge", lambda caption, image: {"all": True})
    (unclip / missing).rename(unclip / "elsewhere")
    assert sentence in report(unclip).text


def test_a_decoder_alone_makes_a_page_too(tmp_path, unclip):
    (tmp_path / "other" / "decoder").mkdir(parents=True)
    text = report(tmp_path / "other").text
    assert "Nothing is trained yet" in text and "No previews yet" in text
    (unclip / "dalle").mkdir()  # of both models: the page is DALL·E's
    assert "DALL·E, from nothing" in report(unclip).text


def test_a_moved_demo_of_dalle_2_still_shows_its_pictures(unclip, monkeypatch):
    monkeypatch.setattr(judge, "judge", lambda caption, image: {"all": True})
    there = unclip.rename(unclip.with_name("moved"))
    assert report(there).images == 4 + 2 + 3 + 4 + 3 + 3 + 3
