"""The tables of `bench all --docs` in Markdown, without and with --against."""

import datetime
import pathlib
from typing import Any

# is_beside -> the two comments around the table.
MARKS = {
    False: ("<!-- bench: begin -->", "<!-- bench: end -->"),
    True: ("<!-- peers: begin -->", "<!-- peers: end -->"),
}

_COLUMNS = (
    "case", "CPU s", "wall s", "images/s", "tokens/s", "GFLOP", "GFLOP / CPU s", "peak MiB",
    "first call s",
)  # fmt: skip
_BESIDE = ("case", "CPU s", "GFLOP", "beside", "CPU s", "GFLOP", "ratio")


def name(result: dict[str, Any]) -> str:
    """The case and its options, in a few words."""
    fields = ("case", "attention", "attention_impl", "source")
    words = [result[field] for field in fields if field in result] + [f"x{result['batch']}"]
    return " ".join(words) + (" one prompt" if result.get("shared_prompt") else "")


def table(results: list[dict[str, Any]]) -> str:
    """Results from one machine: a line with machine and versions, then one row per result."""
    rows = [_COLUMNS]
    for r in results:
        tokens, gflop = r.get("tokens_per_s"), r.get("gflop")
        rows.append(
            (
                name(r),
                f"{r['cpu_s']:.3g}",
                f"{r['median_s']:.3g}",
                f"{r['images_per_s']:.3g}",
                f"{tokens:,.0f}" if tokens else "",
                f"{gflop:.3g}" if gflop else "",
                f"{r['gflop_per_cpu_s']:.3g}" if gflop else "",
                f"{r['peak_rss_mib']:,.0f}",
                f"{r['first_call_s']:.1f}",
            )
        )
    return _markdown(results, rows)


def beside(results: list[dict[str, Any]]) -> str:
    """Results beside their peers', one row per pair."""
    rows = [_BESIDE]
    for r in results:
        for peer, other in r["against"].items():
            ours, theirs = ((f"{x['cpu_s']:.3g}", f"{x['gflop']:.3g}") for x in (r, other))
            rows.append((name(r), *ours, peer, *theirs, f"{other['ratio']:.2f}"))
    return _markdown(results, rows)


def _markdown(results: list[dict[str, Any]], rows: list[tuple[str, ...]]) -> str:
    first = results[0]
    packages = {package: version for r in results for package, version in r["versions"].items()}
    versions = ", ".join(f"{package} {version}" for package, version in packages.items())
    threads = f"{first['threads'] or 'all'} thread" + ("" if first["threads"] == 1 else "s")
    head = f"{datetime.date.today()}, {first['device']}, {threads}; medians of {first['steps']}; "
    rows.insert(1, ("---",) * len(rows[0]))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return f"{head}{versions}.\n\n" + "\n".join(lines) + "\n"


def check(file: str, *, is_beside: bool = False) -> None:
    """Raises UsageError if the page does not exist or lacks the two comments."""
    begin, end = MARKS[is_beside]
    page = pathlib.Path(file)
    text = page.read_text() if page.is_file() else ""
    if not 0 <= text.find(begin) < text.find(end):
        from dalle_jax.types import UsageError  # imports jax, which --threads must precede

        raise UsageError(
            f"--docs={file} has no place for the table; write a page with a line {begin} and after "
            f"it a line {end}."
        )


def write(file: str, results: list[dict[str, Any]], *, is_beside: bool = False) -> None:
    """Writes the table of `results` between the two comments of the page."""
    check(file, is_beside=is_beside)
    begin, end = MARKS[is_beside]
    page = pathlib.Path(file)
    before, _, rest = page.read_text().partition(begin)
    markdown = (beside if is_beside else table)(results)
    page.write_text(f"{before}{begin}\n{markdown}{end}{rest.partition(end)[2]}")
