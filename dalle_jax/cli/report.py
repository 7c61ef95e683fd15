"""Gathers a demo's results into one page: index.html, and metrics.json with its numbers.

  python -m dalle_jax report --demo=runs/demo

Reads the workdirs vqvae, dvae, clip and dalle of the folder, the results of `evaluate` and `sample`
there, and the commands and times that launch/demo.sh noted under logs/. A folder with a workdir
decoder instead of dalle is a demo of DALL·E 2; pages/unclip_tour.py lists its files. A
sentence replaces a part that is missing. The page is one file that loads nothing: it opens from a
mail or a bucket.
"""

import argparse
import json
import pathlib

SUMMARY = "one page with all results of a demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--demo", default="runs/demo", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--out", metavar="FILE", help="the page (default: DIR/index.html)")


def run(args: argparse.Namespace) -> int:
    """Writes the page and the numbers; returns the exit code."""
    from dalle_jax.pages import dalle_tour, unclip_tour
    from dalle_jax.types import UsageError

    demo = pathlib.Path(args.demo)
    if not demo.is_dir():
        raise UsageError(f"--demo={demo} is no folder; make one with: bash launch/demo.sh")
    is_unclip = (demo / "decoder").is_dir() and not (demo / "dalle").is_dir()
    tour = unclip_tour if is_unclip else dalle_tour
    contents = tour.read(demo)
    out = pathlib.Path(args.out) if args.out else demo / "index.html"
    tour.build(demo, contents).write(out)
    numbers = {name: value for name, value in contents.items() if name != "events"}
    (demo / "metrics.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    print(out)
    return 0
