"""tools/test_matrix.py: every row is named at the end, with what came of it or why it was not tried."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def matrix():
    spec = importlib.util.spec_from_file_location("test_matrix_tool", REPOSITORY / "tools" / "test_matrix.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["test_matrix_tool"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["test_matrix_tool"]


def outcomes(matrix, monkeypatch, **status):
    """Rows end as given; the others were not run."""

    def try_row(row, *arguments):
        return matrix.Outcome(row.name, status.get(row.name, "not run"), "no Python of that version", tests=3)

    monkeypatch.setattr(matrix, "ROWS", tuple(matrix.Row(name, "3.11") for name in ("one", "two", "three")))
    monkeypatch.setattr(matrix, "try_row", try_row)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ({"one": "passed"}, 0),
        ({"one": "passed", "two": "failed"}, 1),
        ({}, 2),
        ({"one": "passed", "three": "passed"}, 0),
    ],
)
def test_what_was_not_tried_is_said(matrix, monkeypatch, tmp_path, capsys, status, code):
    outcomes(matrix, monkeypatch, **status)
    assert matrix.main(["--folder", str(tmp_path)]) == code
    summary = capsys.readouterr().out.rsplit("\n\n", 1)[1].splitlines()
    assert [line.split()[0] for line in summary] == ["one", "two", "three"]
    for name, line in zip(("one", "two", "three"), summary, strict=True):
        assert status.get(name, "no Python of that version") in line
    written = json.loads((tmp_path / "results.json").read_text())
    assert [each["status"] for each in written] == [status.get(name, "not run") for name in ("one", "two", "three")]


def test_only_what_is_asked_for(matrix, monkeypatch, tmp_path, capsys):
    outcomes(matrix, monkeypatch, two="passed")
    assert matrix.main(["two", "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("not asked for") == 2
    with pytest.raises(SystemExit):
        matrix.main(["four"])


def test_a_python_that_is_not_there(matrix, tmp_path):
    out = matrix.try_row(matrix.Row("future", "9.9"), tmp_path, 1, download=False, jobs=1)
    assert out.status == "not run" and "no Python 9.9" in out.reason
    this = "{}.{}".format(*sys.version_info)
    assert matrix.find_python(this)


@pytest.mark.parametrize(
    ("torch", "build", "flag", "said"),
    [("1.0", True, "0", "this tree's"), ("2.0", True, "1", "built"), ("1.0", False, "0", "none")],
)
def test_the_extension_is_taken_built_or_left_out_and_that_is_said(
    matrix, monkeypatch, tmp_path, torch, build, flag, said
):
    """This tree's was built for torch 1.0."""
    root = tmp_path / "root"
    (root / "lmvae_fast").mkdir(parents=True)
    (root / "lmvae_fast" / "_C.so").write_bytes(b"library")
    (root / "lmvae_fast" / "_build_info.json").write_text('{"torch": "1.0"}')
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{json.dumps({'torch': torch})}'\n")
    python.chmod(0o755)
    ran = []

    def run(command, log, deadline, where=None, **environment):
        ran.append(environment)
        if "--collected" in command:
            command[command.index("--collected") + 1].write_text("3")
        junit = next((word[11:] for word in map(str, command) if word.startswith("--junitxml=")), None)
        if junit is not None:
            (tmp_path / "row" / "tests.xml").write_text('<testsuite><testcase classname="a" name="b"/></testsuite>')
        return 0

    def copy_tree(folder):
        (folder / "lmvae_fast").mkdir(parents=True)

    for name, value in (("ROOT", root), ("install", lambda *_: python), ("run", run), ("copy_tree", copy_tree)):
        monkeypatch.setattr(matrix, name, value)
    out = matrix.try_row(matrix.Row("row", "3.11"), tmp_path, 1, download=False, jobs=1, build=build)
    assert (out.status, out.tests, out.of, out.versions["C++ extension"]) == ("passed", 1, 3, said)
    assert ran[0]["LMVAE_BUILD_CSRC"] == flag
    assert (tmp_path / "row" / "tree" / "lmvae_fast" / "_C.so").exists() == (said == "this tree's")
    assert said in out.line()


@pytest.mark.parametrize(("every", "first", "wanted"), [(1, 0, [0, 1, 2, 3]), (2, 0, [0, 2]), (2, 1, [1, 3])])
def test_every_nth_test_runs(tmp_path, every, first, wanted):
    (tmp_path / "test_five.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', [0, 1, 2, 3, pytest.param(4, id='left_out')])\n"
        "def test_case(i): print('ran', i)\n"
    )
    options = ["--every", str(every), "--first", str(first), "--collected", str(tmp_path / "collected.txt")]
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:xdist", "-p", "tools.every_nth", "-k", "not left_out"]
    done = subprocess.run(
        [*command, *options, str(tmp_path)], capture_output=True, text=True, cwd=REPOSITORY, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines() if "ran " in line] == [str(i) for i in wanted]
    assert (tmp_path / "collected.txt").read_text() == "4"


def test_each_row_begins_with_another_test(matrix):
    assert [matrix.first_test(row, 4) for row in matrix.ROWS] == [0, 1, 2, 3, 0, 1]
    assert matrix.first_test(matrix.Row("other", "3.11"), 4) == 0


def test_a_record_keeps_the_rows_of_other_days(matrix, monkeypatch, tmp_path):
    file = tmp_path / "versions.json"
    monkeypatch.setattr(matrix, "ROWS", tuple(matrix.Row(name, "3.11") for name in ("one", "two")))
    left_out = matrix.Outcome("two", "not run", "not asked for")
    matrix.record(file, [matrix.Outcome("one", "not run", f"no packages (see {tmp_path}/log.txt)"), left_out], 8)
    matrix.record(file, [matrix.Outcome("two", "passed", tests=5, of=40)], 8)
    rows = json.loads(file.read_text())["rows"]
    assert list(rows) == ["one", "two"]
    assert rows["one"]["reason"] == "no packages" and (rows["two"]["tests"], rows["two"]["of"]) == (5, 40)


def test_large_packages_are_counted_where_they_would_come_over_the_network(matrix, tmp_path, monkeypatch):
    items = [
        {"download_info": {"url": url}, "metadata": {"name": name}}
        for name, url in (("here", "file:///a.whl"), ("far", "https://example.invalid/b.whl"))
    ]
    (tmp_path / "report.json").write_text(json.dumps({"install": items}))

    class Answer:
        def __init__(self):
            self.headers = {"Content-Length": "700"}

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

    monkeypatch.setattr("urllib.request.urlopen", lambda request, timeout: Answer())
    assert matrix.fetched_bytes(tmp_path / "report.json") == {"far": 700}


def test_skipped_tests_are_no_tests_that_ran(matrix, tmp_path):
    (tmp_path / "tests.xml").write_text(
        '<testsuite><testcase classname="a" name="b"/><testcase classname="a" name="c"><skipped/></testcase>'
        '<testcase classname="a" name="d"><failure/></testcase></testsuite>'
    )
    assert matrix.counted(tmp_path / "tests.xml") == (2, ["a::d"])
    assert matrix.counted(tmp_path / "none.xml") == (0, [])


def test_the_package_s_requirements_are_read(matrix):
    found = matrix._requirements()
    assert any(name.startswith("safetensors") for name in found)
    assert not any(name.startswith(("torch", "transformers")) for name in found)
