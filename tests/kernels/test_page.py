"""The page of the ops: its snippets run, are short, and cover every op; importing an op costs next to nothing."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lmvae_fast.kernels

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "kernels" / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
OPS = sorted(
    module.name
    for module in pkgutil.iter_modules(lmvae_fast.kernels.__path__)
    if module.ispkg
)  # fmt: skip


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: re.search(r"kernels\.(\w+) import", text)[1])
def test_a_snippet_runs_and_is_short(snippet):
    assert len(snippet.splitlines()) <= 10
    exec(compile(snippet, "docs/kernels/README.md", "exec"), {})


def test_what_the_snippets_say():
    names: dict = {}
    for snippet in SNIPPETS:
        exec(snippet, names)
        if "posterior_sample" in snippet:
            assert names["z"].shape == (4, 32, 16) and names["kl"].shape == (32,)
        if "latent_kv" in snippet:
            assert names["cache"][..., :1, :].abs().sum() > 0 and not names["cache"][..., 1:, :].any()
        if "coupling_flow" in snippet:
            torch.testing.assert_close(names["back"], -names["logdet"], rtol=1e-4, atol=1e-4)
    assert names["ids"].shape == (4,) and names["y"].shape == (4, 96)


def test_every_op_is_promised_and_shown():
    rows = dict(re.findall(r"^\| `(\w+)` \| \[(\w+)\]\(\w+\.md\) \|", PAGE, re.M))
    assert sorted(rows.values()) == OPS
    for name, folder in rows.items():
        assert name in importlib.import_module(f"lmvae_fast.kernels.{folder}").__all__
        assert any(f"kernels.{folder} import" in snippet and f"{name}(" in snippet for snippet in SNIPPETS), name


IMPORT = """
import sys, time
import_torch = time.process_time()
import torch
import_torch = time.process_time() - import_torch
start = time.process_time()
import importlib
for op in sys.argv[1:]:
    importlib.import_module(f"lmvae_fast.kernels.{op}")
ours = time.process_time() - start
heavy = [name for name in ("transformers", "triton", "torch._dynamo", "lmvae_fast.models") if name in sys.modules]
print(import_torch, ours, *heavy)
import torch._dynamo
from lmvae_fast.kernels.posterior import posterior_sample
torch._dynamo.config.error_on_recompile = False
def sample(m, target):
    return posterior_sample(m, m, seed=3, kl="free_bits", kl_target=target)
compiled = torch.compile(sample, backend="eager", fullgraph=True)
for target in (0.1, 0.2, 0.3, 0.4):
    compiled(torch.zeros(2, 3), target)
print("compiled", torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


def test_importing_every_op_is_quick_and_brings_no_other_library():
    """In CPU seconds of one process, beside torch's own; and what was put off until something compiles is then there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", IMPORT, *OPS],
        capture_output=True,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    figures, compiled = run.stdout.splitlines()
    theirs, ours, *heavy = figures.split()
    assert heavy == []
    assert float(ours) < min(1.0, 0.5 * float(theirs)), f"{ours} s beside torch's {theirs} s"
    assert compiled == "compiled 2", "a number that changes is an input of the graph, from its second value on"
