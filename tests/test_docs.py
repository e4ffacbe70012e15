"""Pages and README against the tree: links, files, modules, commands and targets exist; tables are those of the records."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TEXT = {path: path.read_text() for path in PAGES}
# Where a path in backticks may begin; LangVAE's and a run's own files are no files of the tree.
BASES = (ROOT, ROOT / "lmvae_fast", ROOT / "lmvae_fast" / "training", ROOT / "lmvae_fast" / "models")
FOLDERS = (
    "lmvae_fast|kernels|csrc|tests|benchmarks|tools|docs|examples|models|training|generation|profiling|integrations|"
    "reference|checkpoints"
)


# Names of files that a page may give without a folder.
SOURCES = {
    path.name for folder in ("lmvae_fast", "kernels", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")
}
SOURCES |= {path.name for path in ROOT.glob("*.py")}


def pages(pattern: str):
    return pytest.mark.parametrize(
        "path", [path for path in PAGES if re.search(pattern, TEXT[path])], ids=lambda path: str(path.relative_to(ROOT))
    )


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    lines = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M).splitlines()
    titles = [line.lstrip("#").strip() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", title.lower())).replace(" ", "-") for title in titles}


def broken_links(path: Path, text: str) -> list[str]:
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        other = (path.parent / file).resolve() if file else path
        if not other.exists() or (anchor and anchor not in anchors(other.read_text())):
            found.append(target)
    return found


def missing_files(text: str) -> list[str]:
    found = []
    for name in re.findall(rf"`((?:{FOLDERS})/[\w/.*<>{{}}-]*)`", text):
        pattern = re.sub(r"<\w+>", "*", name).rstrip("/")
        if "/results/" not in name and not any(any(base.glob(pattern)) for base in BASES):
            found.append(name)
    alone = re.findall(r"`(\w+\.py)`", text)
    return found + [name for name in alone if name not in SOURCES]


@pages(r"\]\(")
def test_links_lead_somewhere(path):
    assert broken_links(path, TEXT[path]) == []


@pages(rf"`(?:{FOLDERS})/|\w\.py`")
def test_named_files_exist(path):
    assert missing_files(TEXT[path]) == []


@pages(r"python -m (?:benchmarks|tests|lmvae_fast)\.")
def test_named_modules_exist(path):
    if path.name == "results.md":  # commands of the records, each of its own commit
        return
    for name in re.findall(r"python -m ((?:benchmarks|tests|lmvae_fast)[\w.]+)", TEXT[path]):
        place = ROOT.joinpath(*name.split("."))
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), name


@pages(r"lmvae-fast \w")
def test_named_commands_exist(path):
    from lmvae_fast.cli.app import COMMANDS

    for name in re.findall(r"(?:\$ |`|^)lmvae-fast (\w[\w-]*)", TEXT[path], re.M):
        assert name in {*COMMANDS, "profile", "cache"}, name


@pages(r"`make [a-z]")
def test_named_targets_exist(path):
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z0-9-]+)", TEXT[path])) <= targets


def test_what_is_wrong_is_seen():
    page = ROOT / "docs" / "README.md"
    assert broken_links(page, "[a](nowhere.md) [b](#the-map) [c](#no) [d](https://x.y) [e](results.md#kernels)") == [
        "nowhere.md", "#no"
    ]  # fmt: skip
    assert missing_files("`models/packed.py` `models/lmvae.py` `kernels/<op>/op.py` `rows.py`") == [
        "models/packed.py",
        "rows.py",
    ]


def test_readme_is_short_and_every_page_is_on_the_map():
    assert len(TEXT[ROOT / "README.md"].splitlines()) <= 110
    on_map = {
        (ROOT / "docs" / link).resolve() for link in re.findall(r"\]\(([^)#]+)", TEXT[ROOT / "docs" / "README.md"])
    }
    assert {path for path in PAGES if path.parent != ROOT and path.name != "README.md"} <= on_map


def test_tables_and_picture_are_those_of_the_records():
    assert report.stale() == {}
    for name in report.TABLES:
        places = [path.name for path in PAGES if f"<!-- begin:{name} -->" in TEXT[path]]
        elsewhere = {"highlights": "README.md", "reconstructions": "README.md", "roofline": "gpu.md"}
        page = (elsewhere | {"versions": "compatibility.md"}).get(name, "results.md")
        assert places == [page], name


def test_the_snippets_of_debugging_run():
    first = re.findall(r"```python\n(.*?)```", TEXT[ROOT / "docs" / "debugging.md"], re.S)[0]
    done = subprocess.run(
        [sys.executable, "-c", first],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    differences = [float(line.rpartition(": ")[2]) for line in done.stdout.splitlines()]
    assert len(differences) >= 3 and max(differences) < 1e-4
