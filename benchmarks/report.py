"""Tables of README.md and docs, and README's picture, made from the JSON files under benchmarks/results/ and nothing else.

python -m benchmarks.report            # rewrite what stands between <!-- begin:NAME --> and <!-- end:NAME -->
python -m benchmarks.report --check    # exit 1 if a file does not say what the results say
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import chart, highlights, makes, roofline, versions
from benchmarks.common.records import ROOT
from benchmarks.compute.tables import TABLES as COMPUTE_TABLES
from benchmarks.generation.long_run_table import TABLES as LONG_RUN_TABLES
from benchmarks.generation.tables import TABLES as GENERATION_TABLES
from benchmarks.integrations.tables import TABLES as INTEGRATION_TABLES
from benchmarks.kernels.tables import TABLES as KERNEL_TABLES
from benchmarks.science.study_tables import TABLES as STUDY_TABLES
from benchmarks.science.tables import TABLES as SCIENCE_TABLES
from benchmarks.system_tables import TABLES as SYSTEM_TABLES
from benchmarks.training.scaling_tables import TABLES as SCALING_TABLES
from benchmarks.training.tables import TABLES as STEP_TABLES

FILES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
# By the name of its markers. All but README's own, what is expected of GPUs and what was tried stand in docs/results.md.
TABLES: dict[str, Callable[[], str]] = {
    **highlights.TABLES, **makes.TABLES, **STEP_TABLES, **GENERATION_TABLES, **LONG_RUN_TABLES, **KERNEL_TABLES,
    **SCALING_TABLES, **COMPUTE_TABLES, **SCIENCE_TABLES, **STUDY_TABLES, **SYSTEM_TABLES, **INTEGRATION_TABLES,
    **roofline.TABLES, **versions.TABLES,
}  # fmt: skip


def filled(text: str) -> str:
    """The text with every marked table made anew."""
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- begin:{name} -->\n).*?(\n?<!-- end:{name} -->)", re.S)
        if pattern.search(text):
            text = pattern.sub(lambda match, table=table: match[1] + table() + "\n" + match[2].lstrip("\n"), text)
    return text


def stale() -> dict[Path, str]:
    """Files that do not say what the results say, and what they should say."""
    wanted = {path: filled(path.read_text()) for path in FILES if path.is_file()}
    picture = chart.picture()
    if picture is not None:
        wanted[chart.FILE] = picture
    return {path: text for path, text in wanted.items() if not path.is_file() or path.read_text() != text}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    outdated = stale()
    for path, text in outdated.items():
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        print(f"{'stale' if check else 'updated'}: {path.relative_to(ROOT)}")
    return int(check and bool(outdated))


if __name__ == "__main__":
    sys.exit(main())
