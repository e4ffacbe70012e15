"""The long run of the command line in small: killed at random moments and continued, the file is the same."""

from __future__ import annotations

import argparse
import time

import pytest

from benchmarks.generation.long_run import Run, killed_and_continued, make_model


@pytest.mark.slow
def test_killed_and_continued(tmp_path):
    options = argparse.Namespace(shape="tiny", latents=600, batch=16, workers=1, threads=1, kills=2, seed=1)
    model = make_model(tmp_path, options)
    whole = Run(model, tmp_path / "whole.jsonl", options)
    assert whole.wait()
    seconds = time.perf_counter() - whole.start
    found = killed_and_continued(model, tmp_path / "killed.jsonl", options, seconds)
    assert len(found["kills_after_seconds"]) == 2
    lines = whole.output.read_bytes()
    assert lines.count(b"\n") == 600 and (tmp_path / "killed.jsonl").read_bytes() == lines
