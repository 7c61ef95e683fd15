"""Line charts as inline SVG, small enough for a page that loads nothing.

Colours are the CSS variables --c0 … --c7 and the classes of `pages.html`, so that one chart serves
light and dark; every colour has its own dash pattern, for eyes that do not distinguish the colours.
"""

import html
import math
from collections.abc import Mapping, Sequence

Series = tuple[Sequence[float], Sequence[float | None]]  # x, y; a gap where y is None or not finite

_MAX_POINTS = 400  # a chart is 300 px wide: more points only make the file heavy
_MAX_COLOURS = 8  # as many as the style sheet names; each has its own dash pattern too
_DASHES = ("", "6 3", "2 3", "9 3 2 3", "", "6 3", "2 3", "9 3 2 3")

_W, _H, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 240, 48, 10, 8, 36  # view box and margins


def line_chart(
    series: Mapping[str, Series],
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    *,
    x_log: bool = False,
    y_log: bool = False,
    y_min: float | None = None,
    y_max: float | None = None,
) -> str:
    """The `<svg>` of `series` without a legend; arguments as `html.Page.chart`.

    Raises:
      ValueError: for more series than there are colours, or x and y of unequal length.
    """
    if len(series) > _MAX_COLOURS:
        raise ValueError(f"{len(series)} series in one chart; at most {_MAX_COLOURS}.")
    lines = [_runs(name, x, y, x_log, y_log, y_min, y_max) for name, (x, y) in series.items()]
    return _svg(lines, title, x_label, y_label, x_log, y_log, y_min, y_max)


def swatch(index: int) -> str:
    """The legend's piece of line for series number `index`."""
    return f'<svg viewBox="0 0 26 8" aria-hidden="true">{_stroke(index, "M0 4H26")}</svg>'


def _runs(name, x, y, x_log, y_log, y_min, y_max) -> list[list[tuple[float, float]]]:
    """The drawable stretches of one line, thinned to _MAX_POINTS."""
    x, y = list(x), list(y)
    if len(x) != len(y):
        raise ValueError(f"series {name!r} has {len(x)} x values and {len(y)} y values.")
    runs, run = [], []
    stride = max(1, math.ceil(len(x) / _MAX_POINTS))
    for i, (a, b) in enumerate(zip(x, y, strict=True)):
        if i % stride and i != len(x) - 1:
            continue
        fine = a is not None and b is not None and math.isfinite(a) and math.isfinite(b)
        if fine and not (x_log and a <= 0) and not (y_log and b <= 0):
            b = max(b, y_min) if y_min is not None else b
            run.append((float(a), float(min(b, y_max) if y_max is not None else b)))
        elif run:
            runs.append(run)
            run = []
    return [*runs, run] if run else runs


def _svg(lines, title, x_label, y_label, x_log, y_log, y_min, y_max) -> str:
    points = [point for runs in lines for run in runs for point in run]
    if not points:
        return "<p>No values yet.</p>"
    to_x, x_ticks = _axis([p[0] for p in points], x_log, None, None, _LEFT, _W - _RIGHT)
    to_y, y_ticks = _axis([p[1] for p in points], y_log, y_min, y_max, _H - _BOTTOM, _TOP)
    label = html.escape(title or y_label or "chart", quote=True)
    out = [f'<svg viewBox="0 0 {_W} {_H}" role="img" aria-label="{label}">']
    for tick in y_ticks:
        out.append(
            f'<path class="grid" d="M{_LEFT} {to_y(tick):.1f}H{_W - _RIGHT}"/>'
            f'<text x="{_LEFT - 6}" y="{to_y(tick) + 4:.1f}" text-anchor="end">{_tick(tick)}</text>'
        )
    for tick in x_ticks:
        out.append(
            f'<path class="grid" d="M{to_x(tick):.1f} {_H - _BOTTOM}v4"/>'
            f'<text x="{to_x(tick):.1f}" y="{_H - _BOTTOM + 16}" text-anchor="middle">'
            f"{_tick(tick)}</text>"
        )
    middle = (_LEFT + _W - _RIGHT) / 2
    out.append(
        f'<text x="{middle}" y="{_H - 4}" text-anchor="middle">{html.escape(x_label)}</text>'
    )
    height = (_TOP + _H - _BOTTOM) / 2
    out.append(
        f'<text transform="translate(10 {height}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y_label)}</text>"
    )
    for i, runs in enumerate(lines):
        for run in runs:
            at = [f"{to_x(a):.1f} {to_y(b):.1f}" for a, b in run]
            out.append(_stroke(i, "M" + "L".join(at)))
            if len(run) <= 12:  # few enough to be measurements: show where they are
                out += [
                    f'<circle cx="{to_x(a):.1f}" cy="{to_y(b):.1f}" r="2.6" '
                    f'style="fill:var(--c{i})"><title>{a:g}: {b:.4g}</title></circle>'
                    for a, b in run
                ]
    return "".join(out) + "</svg>"


def _stroke(index: int, path: str) -> str:
    dash = f' stroke-dasharray="{_DASHES[index]}"' if _DASHES[index] else ""
    return (
        f'<path d="{path}"{dash} style="stroke:var(--c{index});fill:none;stroke-width:1.8;'
        'stroke-linejoin:round"/>'
    )


def _axis(values, log, low, high, start, end):
    """(value -> position, ticks) of an axis that runs from `start` to `end` in the view box."""
    low = min(values) if low is None else low
    high = max(values) if high is None else high
    if log:
        low, high = math.log10(low), math.log10(high)
    if high - low < 1e-12 * max(1.0, abs(low)):  # one value: give it room on both sides
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    counts = sorted(set(values))
    if log and 3 <= len(counts) <= 8 and all(value == int(value) for value in counts):
        ticks = counts  # 1, 2, 4, … candidates: the measured points themselves
    else:
        ticks = _log_ticks(low, high) if log else _ticks(low, high)

    def position(value: float) -> float:
        value = math.log10(value) if log else value
        return start + (end - start) * (value - low) / (high - low)

    return position, ticks


def _ticks(low: float, high: float) -> list[float]:
    """At most six round numbers between low and high."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Decades; with 2 and 5, or plain round numbers, where there are few."""
    decades = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
    if len(decades) >= 3:
        return [10.0**k for k in decades][:: math.ceil(len(decades) / 6)]
    fine = [
        m * 10.0**k
        for k in range(math.floor(low), math.ceil(high) + 1)
        for m in (1, 2, 5)
        if low - 1e-9 <= math.log10(m * 10.0**k) <= high + 1e-9
    ]
    return fine if len(fine) >= 2 else _ticks(10**low, 10**high)


def _tick(value: float) -> str:
    """A tick's label: 12k, 0.25, 1e-06."""
    if value and abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{round(value, 10):g}" if abs(value) >= 1e-6 or not value else f"{value:.0e}"
