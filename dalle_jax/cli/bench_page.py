"""How a benchmark looks on a page: the ledger of `bench all --docs`."""

import datetime
import pathlib
from typing import Any

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"

_COLUMNS = (
    "case", "CPU s", "wall s", "images/s", "tokens/s", "GFLOP", "GFLOP / CPU s", "peak MiB",
    "first call s",
)  # fmt: skip


def name(result: dict[str, Any]) -> str:
    """What was timed, in a few words."""
    fields = ("case", "attention", "attention_impl", "source")
    words = [result[field] for field in fields if field in result] + [f"x{result['batch']}"]
    return " ".join(words) + (" one prompt" if result.get("shared_prompt") else "")


def table(results: list[dict[str, Any]]) -> str:
    """Results of one machine as Markdown: on what they were measured, and a row each."""
    first = results[0]
    versions = ", ".join(f"{package} {version}" for package, version in first["versions"].items())
    threads = f"{first['threads'] or 'all'} thread" + ("" if first["threads"] == 1 else "s")
    head = (
        f"{datetime.date.today()}, {first['device']}, {threads}; medians of {first['steps']}; "
        f"{versions}.\n\n"
    )
    rows = [_COLUMNS, ("---",) * len(_COLUMNS)]
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
    return head + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def check(file: str) -> None:
    """Raises UsageError if the page is not there or has no place for the table."""
    page = pathlib.Path(file)
    text = page.read_text() if page.is_file() else ""
    if not 0 <= text.find(BEGIN) < text.find(END):
        from dalle_jax.types import UsageError  # imports jax, which --threads must precede

        raise UsageError(
            f"--docs={file} has no place for the table; write a page with a line {BEGIN} and after "
            f"it a line {END}."
        )


def write(file: str, results: list[dict[str, Any]]) -> None:
    """Puts the table of `results` between the two comments of the page."""
    check(file)
    page = pathlib.Path(file)
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{table(results)}{END}{after}")
