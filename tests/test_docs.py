"""README and docs: every file is in the tree, and every link, path and config in them exists."""

import pathlib
import re

import pytest

from dalle_jax import config as cfg

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dalle_jax"
HOUSE = ROOT / "docs" / "how_it_works.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "launch" / "README.md"])
# Names that a page mentions because they are gone.
HISTORY = {"lab_notebook.md", "CHANGELOG.md"}


def package_files() -> set[str]:
    """Every module, but the __init__.py of rooms, which hold a docstring only."""
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if (path.name != "__init__.py" or path.parent == PACKAGE)
        and path.relative_to(PACKAGE).parts[0] not in ("configs", "pretrained")
    }


def files_in_tree(text: str) -> dict[str, str]:
    """Path below dalle_jax/ -> the words behind it, from an indented tree."""
    files, folders = {}, []
    for line in text.splitlines():
        entry = re.match(r"( *)(\w+/|\w+\.py)(?: +(\S.*))?$", line)
        assert entry, f"no folder and no module: {line!r}"
        depth = len(entry[1]) // 2
        folders = folders[:depth]
        if entry[2].endswith("/"):
            folders.append(entry[2])
        else:
            files["".join([*folders[1:], entry[2]])] = entry[3] or ""
    return files


def page_tree() -> dict[str, str]:
    text = HOUSE.read_text()
    return files_in_tree(
        re.search(r"<!-- tree: begin -->\n```text\n(.*?)\n```\n<!-- tree: end -->", text, re.S)[1]
    )


def test_the_tree_has_every_file_and_no_other():
    tree, files = page_tree(), package_files()
    assert files - tree.keys() == set(), "give these a line in docs/how_it_works.md"
    assert tree.keys() - files == set(), "docs/how_it_works.md lists files that are gone"
    assert not [name for name, words in tree.items() if len(words) < 4], "a line has words"


def test_the_tree_reader_itself():
    text = "dalle_jax/\n  axes.py   letters\n  nn/   layers\n    conv.py  c\n    b/\n      x.py y"
    assert files_in_tree(text) == {"axes.py": "letters", "nn/conv.py": "c", "nn/b/x.py": "y"}


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name + "/" + page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name + "/" + page.name)
def test_paths_exist(page):
    """`engine/loop.py` may be said from the root or from the package."""
    if page.name in HISTORY:
        return
    for path in re.findall(r"(?<![\w/.])((?:\w+/)+\w+\.(?:py|sh|md))(?!\w)", page.read_text()):
        if "NAME" in path or path.startswith(("runs/", "samples/", "mine/")):
            continue
        bases = (ROOT, PACKAGE, page.parent)
        assert any((base / path).exists() for base in bases), f"{page.name} names {path}"


def test_the_drawing_names_files_that_exist():
    drawing = (ROOT / "docs" / "images" / "pipelines.svg").read_text()
    names = re.findall(r'class="file"[^>]*>([^<]+)<', drawing)
    assert len(names) > 20
    for name in names:
        pattern = name.replace("NAME", "*")
        assert list(PACKAGE.glob(pattern)) or list(ROOT.glob(pattern)), name


def named_configs() -> list[str]:
    """`--config=dalle:size=emoji` and `config dalle:size=emoji`, without the folder."""
    texts = [page.read_text() for page in PAGES]
    before = r"(?:--config=|dalle_jax config |dalle-jax config )"
    pattern = before + r"((?!configs/)[a-z]\w*(?::[\w=,]+)?)"
    return sorted({name for text in texts for name in re.findall(pattern, text)})


@pytest.mark.parametrize("name", named_configs())
def test_configs_named_without_a_folder_load(name):
    file, colon, arguments = name.partition(":")
    assert cfg.load(f"{ROOT}/configs/{file}.py{colon}{arguments}").train.steps > 0


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900
