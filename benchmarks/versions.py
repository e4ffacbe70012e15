"""The table of versions that were tried, from what tools/test_matrix.py recorded: benchmarks/results/versions.json."""

from __future__ import annotations

from benchmarks.common.records import load


def versions() -> str:
    """Row by row: the versions, how many tests ran and failed, or why it could not be tried."""
    rows = (load("versions.json") or {}).get("rows", {})
    lines = ["| row | versions | C++ extension | what came of it | commit |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        found = dict(row["versions"])
        extension = found.pop("C++ extension", "")
        said = f"{row['status']}: {row['reason']}"
        if row["status"] != "not run":
            sample = f"{row['tests']} of {row['of']} tests ran (every {row['every']}th)"
            said = f"{row['status']}: {sample}, {len(row['failed'])} failed"
        listed = ", ".join(f"{package} {version}" for package, version in found.items())
        lines.append(f"| {name} | {listed} | {extension} | {said} | {row['commit']} |")
    return "\n".join(lines)


TABLES = {"versions": versions}
