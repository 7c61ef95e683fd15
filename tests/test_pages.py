"""pages: well-formed HTML that loads nothing and escapes everything."""

import html.parser
import math
import re

import numpy as np
import pytest

from dalle_jax.pages import charts
from dalle_jax.pages.html import Page

VOID = {"meta", "img"}


class Reader(html.parser.HTMLParser):
    """Checks the nesting of tags; collects ids, links and text."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.links, self.words, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "srcset", "action", "data", "xlink:href"):
                self.links.append(value)
            assert not name.startswith("on"), f"script in {name}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in ("path", "circle"), f"<{tag}/> closes itself in SVG only"
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        self.words.append(data)


def full_page(rng) -> Page:
    pictures = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    page = Page("Title <b>", "subtitle & more")
    page.section("First part", "text `code <i>`\n\nsecond").facts([("PSNR", "26 dB", "of <8>")])
    page.chart({"a<b": ([1, 2, 3], [3.0, 2.0, 1.0]), "c": ([1], [1.0])}, "loss", "step", "nats")
    page.chart({"late": ([1, 10, 100], [None, math.nan, 2.0])}, x_log=True, y_log=True)
    page.command("python -m dalle_jax sample --prompt='<script>alert(1)</script>'")
    page.section("First part").gallery([(p, "cap\"tion' <x>") for p in pictures], cell_px=96)
    page.figure(pictures[0], "one").table([{"skill": "single", "n": 2000, "best": None}], "t")
    return page.note("careful").heading("h").text("end")


def test_pages_are_balanced_self_contained_and_escaped(rng):
    text = full_page(rng).html()
    reader = Reader(text)
    assert len(reader.ids) == len(set(reader.ids))
    for link in reader.links:
        assert link.startswith("data:image/png;base64,") or link.removeprefix("#") in reader.ids
    assert "script" not in reader.tags and "link" not in reader.tags
    assert not re.search(r"url\(|@import|https?://", text)
    words = "".join(reader.words)
    for part in ("Title <b>", "subtitle & more", "code <i>", "<script>alert(1)</script>", "a<b"):
        assert part in words


def test_every_image_has_words_for_who_cannot_see_it(rng):
    text = full_page(rng).html()
    assert text.count("<img") == text.count(' alt="') == 4
    assert 'alt="cap&quot;tion&#x27; &lt;x&gt;"' in text


def test_the_same_page_twice_is_the_same_file(rng, tmp_path):
    page = full_page(rng)
    assert page.html() == page.html()
    assert page.write(tmp_path / "deep" / "index.html").read_text("utf-8") == page.html()


def test_numbers_are_flush_right_and_none_is_a_dash():
    rows = [{"name": "a", "x": 0.12345, "n": 12000}, {"name": "b", "x": None, "n": 3}]
    text = Page("t").table(rows).html()
    assert '<td class="num">0.123</td><td class="num">12,000</td>' in text
    assert '<td class="num">–</td>' in text and "<td>a</td>" in text


def test_an_empty_page_and_empty_parts_are_well_formed():
    Reader(Page("nothing").html())
    Reader(Page("t").section("s").chart({}, "none").chart({"a": ([], [])}).table([]).html())
    assert "No values yet" in Page("t").chart({"a": ([], [])}).html()


def points(svg: str) -> np.ndarray:
    """All points of the first line, in view box units."""
    path = re.search(r'<path d="M([^"]*)"', svg).group(1)
    return np.array([[float(v) for v in p.split()] for p in path.split("L")])


def test_chart_lines_are_the_data_up_to_an_affine_map(rng):
    x, y = np.arange(1, 50), rng.normal(size=49)
    at = points(charts.line_chart({"a": (x, y)}))
    assert np.corrcoef(at[:, 0], x)[0, 1] > 0.99999
    assert np.corrcoef(at[:, 1], y)[0, 1] < -0.9999  # SVG counts downwards
    at = points(charts.line_chart({"a": (x, x**2)}, x_log=True, y_log=True))
    assert np.corrcoef(at[:, 0], np.log(x))[0, 1] > 0.99999
    assert np.corrcoef(at[:, 1], np.log(x))[0, 1] < -0.99999


def test_chart_gaps_limits_and_length():
    svg = charts.line_chart({"a": ([1, 2, 3, 4, 5], [1.0, 2.0, None, 4.0, math.inf])})
    assert len(re.findall(r'<path d="M[\d.]+ [\d.]+L', svg)) == 1  # 1-2; 4 is a lone dot
    assert svg.count("<circle") == 3
    svg = charts.line_chart({"a": (range(100_000), [0.5] * 100_000)}, y_min=0, y_max=1)
    assert len(svg) < 12_000 and points(svg)[-1, 0] == pytest.approx(390, abs=0.2)
    np.testing.assert_allclose(points(svg)[:, 1], (8 + 204) / 2, atol=0.1)
    with pytest.raises(ValueError, match="3 x values and 2"):
        charts.line_chart({"a": ([1, 2, 3], [1, 2])})
    with pytest.raises(ValueError, match="at most"):
        charts.line_chart({str(i): ([1], [1]) for i in range(9)})


@pytest.mark.parametrize(
    ("values", "log", "ticks"),
    [
        ([0, 1], False, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ([0, 30_000], False, ["0", "10k", "20k", "30k"]),
        ([1, 64], True, ["1", "2", "4", "8", "16", "32", "64"]),
        ([0.001, 10], True, ["0.001", "0.01", "0.1", "1", "10"]),
        ([2.0, 3.0], True, ["2", "2.2", "2.4", "2.6", "2.8", "3"]),
    ],
)
def test_ticks_are_round(values, log, ticks):
    if ticks[-1] == "64":
        values = [1, 2, 4, 8, 16, 32, 64]
    svg = charts.line_chart({"a": (values, values)}, x_log=log)
    below = re.findall(r'y="220" text-anchor="middle">([^<]+)<', svg)
    assert below == ticks
