"""Static pages: one self-contained HTML file that opens from a bucket, a mail or a phone.

    page = Page("Shapes", "a quarter of an hour of training on two cores")
    page.section("Loss").chart({"text": (steps, text_loss)}, x_label="step", y_label="nats")
    page.command("python -m dalle_jax report --demo=runs/demo")
    page.write("runs/demo/index.html")

Nothing is fetched: pictures are data URIs, charts are inline SVG, there is no script, and the
page's own content policy forbids anything else. All text is escaped; `code` in backticks becomes
code. Every number should have the `command` that reproduces it beside it.
"""

import html
import io
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dalle_jax import images
from dalle_jax.pages import charts

Picture = np.ndarray | Image.Image | bytes  # uint8 [h, w, 3], PIL, or PNG bytes

_STYLE = """
:root{color-scheme:light dark;--bg:#fcfcfd;--ink:#1c1c20;--soft:#5f6068;--line:#dddde3;--card:#fff;
--code:#f1f1f5;--link:#1d5fbf;--c0:#1f6fb5;--c1:#c2550a;--c2:#12805c;--c3:#a93d84;--c4:#7a5cc4;
--c5:#8a6d00;--c6:#b3262e;--c7:#3b7f8c}
@media(prefers-color-scheme:dark){:root{--bg:#141417;--ink:#ececf0;--soft:#a3a4ad;--line:#33343b;
--card:#1c1c21;--code:#24242b;--link:#86b7f5;--c0:#6db3f2;--c1:#f2a15f;--c2:#4fcb9d;--c3:#e58bc4;
--c4:#b49cf0;--c5:#d9bd4a;--c6:#f27d80;--c7:#7ac5d2}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,
"Segoe UI",Roboto,sans-serif;-webkit-text-size-adjust:100%}
main,header,footer{max-width:1160px;margin:0 auto;padding:0 max(16px,2.5vw)}
header{padding-top:36px}h1{font-size:clamp(1.6rem,4.5vw,2.3rem);line-height:1.15;margin:0 0 .3em}
header p{color:var(--soft);font-size:1.08rem;margin:0 0 8px;max-width:70ch}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:14px 0;font-size:.95rem}a{color:var(--link)}
section{margin:36px 0;padding-top:10px;border-top:1px solid var(--line)}
h2{font-size:1.35rem;margin:.4em 0}h3{font-size:1.05rem;margin:1.6em 0 .4em}
p{margin:.6em 0;max-width:72ch}.note{border-left:3px solid var(--c1);padding-left:12px}
code{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--code);
border-radius:4px;padding:.1em .3em;overflow-wrap:anywhere}
pre{background:var(--code);border-radius:8px;padding:10px 12px;margin:.7em 0;white-space:pre-wrap;
overflow-wrap:anywhere;user-select:all}pre code{background:none;padding:0}
figure{margin:14px 0}figcaption{color:var(--soft);font-size:.88rem;line-height:1.4;margin-top:6px}
img{display:block;max-width:100%;height:auto;border-radius:4px}
.pixels{image-rendering:pixelated}
.gallery{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(var(--cell),1fr));
padding:0;margin:14px 0;list-style:none}.gallery figure{margin:0}.gallery img{width:100%}
.gallery figcaption{overflow-wrap:anywhere}
.facts{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));margin:16px 0}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 14px}
.facts dt{color:var(--soft);font-size:.86rem}.facts dd{margin:0}
.facts .value{font-size:1.5rem;font-variant-numeric:tabular-nums}
.facts .small{color:var(--soft);font-size:.82rem;line-height:1.35}
.charts{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr))}
.chart{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 12px;
margin:0;min-width:0;max-width:620px}.chart svg{display:block;width:100%;height:auto}
.chart text{fill:var(--soft);font:11px system-ui,sans-serif}.chart .grid{stroke:var(--line)}
.chart h3{margin:0 0 4px;font-size:.98rem}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;list-style:none;padding:0;margin:6px 0 0}
.legend svg{display:inline-block;width:26px;height:8px;margin-right:5px}
.scroll{overflow-x:auto;margin:12px 0}table{border-collapse:collapse;font-size:.93rem}
.soft{color:var(--soft);font-size:.88rem;margin-bottom:0}td:first-child{min-width:8em}
th,td{padding:6px 12px 6px 0;border-bottom:1px solid var(--line);text-align:left;
vertical-align:top}td.num,th.num{text-align:right;font-variant-numeric:tabular-nums;
white-space:nowrap}
footer{color:var(--soft);font-size:.86rem;padding-bottom:48px}
"""


class Page:
    """A page; every method appends to it and returns it, so that calls chain."""

    def __init__(self, title: str, subtitle: str = "", lang: str = "en"):
        self._title, self._subtitle, self._lang = title, subtitle, lang
        self._sections: list[tuple[str, str]] = []
        self._parts: list[str] = []
        self._in_section = False
        self._in_charts = False

    def section(self, heading: str, text: str = "") -> "Page":
        """Starts a section with an anchor, listed in the navigation."""
        self._close_section()
        anchor = re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") or "section"
        if anchor in (name for name, _ in self._sections):
            anchor = f"{anchor}-{len(self._sections) + 1}"
        self._sections.append((anchor, heading))
        self._parts.append(f'<section id="{anchor}"><h2>{_text(heading)}</h2>')
        self._in_section = True
        return self.text(text) if text else self

    def heading(self, text: str) -> "Page":
        """A heading inside a section."""
        return self._add(f"<h3>{_text(text)}</h3>")

    def text(self, text: str) -> "Page":
        """Paragraphs, separated by empty lines; `backticks` become code."""
        paragraphs = [part for part in re.split(r"\n\s*\n", text.strip()) if part]
        return self._add("".join(f"<p>{_text(part)}</p>" for part in paragraphs))

    def note(self, text: str) -> "Page":
        """A paragraph set apart: a limit, a missing part, a warning."""
        return self._add(f'<p class="note">{_text(text)}</p>')

    def command(self, command: str) -> "Page":
        """The command that reproduces what is above it; one tap selects all of it."""
        return self._add(f"<pre><code>{html.escape(command.strip())}</code></pre>")

    def facts(self, items: Iterable[tuple[str, str, str]]) -> "Page":
        """Headline numbers as tiles: (what, value, small print)."""
        tiles = "".join(
            f'<div><dt>{_text(what)}</dt><dd class="value">{_text(value)}</dd>'
            f'<dd class="small">{_text(small)}</dd></div>'
            for what, value, small in items
        )
        return self._add(f'<dl class="facts">{tiles}</dl>')

    def figure(
        self, image: Picture, caption: str = "", alt: str = "", *, pixelated: bool = True
    ) -> "Page":
        """One picture with its caption.

        Args:
          image: the picture; small ones are enlarged by the browser without blur.
          caption: the text under it.
          alt: text for screen readers; the caption when empty.
          pixelated: False for photographs and pictures that contain text.
        """
        return self._add(
            f"<figure>{_img(image, alt or caption, pixelated)}{_cap(caption)}</figure>"
        )

    def gallery(
        self, items: Iterable[tuple[Picture, str]], cell_px: int = 128, *, pixelated: bool = True
    ) -> "Page":
        """Pictures with captions in as many columns as the screen holds.

        Args:
          items: (picture, caption) pairs.
          cell_px: smallest width of a column.
          pixelated: as `figure`.
        """
        cells = "".join(
            f"<li><figure>{_img(image, caption, pixelated)}{_cap(caption)}</figure></li>"
            for image, caption in items
        )
        return self._add(f'<ul class="gallery" style="--cell:{int(cell_px)}px">{cells}</ul>')

    def table(
        self, rows: Sequence[Mapping[str, Any]], caption: str = "", columns: Sequence[str] = ()
    ) -> "Page":
        """A table; it scrolls sideways by itself where the screen is narrow.

        Args:
          rows: column name -> value; numbers are flush right, None is a dash.
          caption: of the table.
          columns: names in order; those of the first row when empty.
        """
        columns = list(columns) or (list(rows[0]) if rows else [])
        numeric = {
            name: any(_is_number(row.get(name)) for row in rows)
            and all(_is_number(row.get(name)) or row.get(name) is None for row in rows)
            for name in columns
        }
        css = {name: ' class="num"' if numeric[name] else "" for name in columns}
        head = "".join(f'<th scope="col"{css[name]}>{_text(name)}</th>' for name in columns)
        body = "".join(
            "<tr>"
            + "".join(f"<td{css[name]}>{_text(_value(row.get(name)))}</td>" for name in columns)
            + "</tr>"
            for row in rows
        )
        # Not a <caption>: that would scroll out of sight with a wide table.
        title = f'<p class="soft">{_text(caption)}</p>' if caption else ""
        label = f' aria-label="{html.escape(caption, quote=True)}"' if caption else ""
        table = f"<table{label}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        # tabindex: a keyboard can scroll what overflows.
        return self._add(f'{title}<div class="scroll" tabindex="0">{table}</div>')

    def chart(
        self,
        series: Mapping[str, charts.Series],
        title: str = "",
        x_label: str = "",
        y_label: str = "",
        *,
        x_log: bool = False,
        y_log: bool = False,
        y_min: float | None = None,
        y_max: float | None = None,
        caption: str = "",
    ) -> "Page":
        """A line chart as inline SVG; consecutive charts are side by side on wide screens.

        Args:
          series: name -> (x, y). Gaps where a value is None or not finite, or not positive on a
            logarithmic axis.
          title: heading above the chart.
          x_label: name and unit of the horizontal axis.
          y_label: name and unit of the vertical axis.
          x_log: logarithmic horizontal axis.
          y_log: logarithmic vertical axis.
          y_min: lower end of the vertical axis; from the data when None.
          y_max: upper end; from the data when None.
          caption: a sentence under the legend.

        Raises:
          ValueError: for more series than there are colours, or x and y of unequal length.
        """
        svg = charts.line_chart(
            series, title, x_label, y_label, x_log=x_log, y_log=y_log, y_min=y_min, y_max=y_max
        )
        swatches = "".join(
            f"<li>{charts.swatch(i)}{_text(name)}</li>" for i, name in enumerate(series)
        )
        legend = f'<ul class="legend">{swatches}</ul>'
        small = f"<p>{_text(caption)}</p>" if caption else ""
        head = f"<h3>{_text(title)}</h3>" if title else ""
        if not self._in_charts:
            self._parts.append('<div class="charts">')
            self._in_charts = True
        self._parts.append(
            f'<figure class="chart">{head}{svg}<figcaption>{legend}{small}</figcaption></figure>'
        )
        return self

    def html(self) -> str:
        """The page as text."""
        self._close_section()
        subtitle = f"<p>{_text(self._subtitle)}</p>" if self._subtitle else ""
        links = "".join(f'<a href="#{a}">{_text(name)}</a>' for a, name in self._sections)
        nav = f'<nav aria-label="Sections">{links}</nav>' if len(self._sections) > 1 else ""
        return (
            f'<!DOCTYPE html>\n<html lang="{html.escape(self._lang)}"><head><meta charset="utf-8">'
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "img-src data:; style-src 'unsafe-inline'\">"
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self._title)}</title><style>{_STYLE}</style></head>\n<body>"
            f"<header><h1>{_text(self._title)}</h1>{subtitle}{nav}</header>\n<main>"
            + "\n".join(self._parts)
            + "</main>\n<footer>Written by dalle_jax. This page loads nothing."
            "</footer></body></html>\n"
        )

    def write(self, path: str | pathlib.Path) -> pathlib.Path:
        """Writes the page, making folders as needed; returns the path."""
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.html(), encoding="utf-8")
        return path

    def _add(self, part: str) -> "Page":
        self._close_charts()
        self._parts.append(part)
        return self

    def _close_charts(self):
        if self._in_charts:
            self._parts.append("</div>")
            self._in_charts = False

    def _close_section(self):
        self._close_charts()
        if self._in_section:
            self._parts.append("</section>")
            self._in_section = False


def _text(text: Any) -> str:
    """Escaped text, `backticks` as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(str(text), quote=True))


def _cap(caption: str) -> str:
    return f"<figcaption>{_text(caption)}</figcaption>" if caption else ""


def _img(image: Picture, alt: str, pixelated: bool) -> str:
    uri = images.data_uri(image)
    css = ' class="pixels"' if pixelated else ""
    width = _width(image)
    if pixelated and width < 160:  # integer multiples stay sharp
        css += f' width="{width * (256 // width)}"'
    return f'<img{css} src="{uri}" alt="{html.escape(str(alt), quote=True)}" loading="lazy">'


def _width(image: Picture) -> int:
    if isinstance(image, bytes):
        return Image.open(io.BytesIO(image)).width
    return image.width if isinstance(image, Image.Image) else image.shape[1]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, (float, np.floating)):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
