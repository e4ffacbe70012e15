"""Folders of Invertible CVAEs: safetensors and JSON, nothing unpickled, nothing half written.

config.json              flow (kind, blocks ...), its stages, bridge, clusters, where VAE and vectors are, fingerprints
flow.safetensors         the flow's numbers, the bridge's matrix, the clusters' centres
word_vectors.safetensors the word vectors, unless a package has just these or the VAE itself makes them
vae/                     the VAE, where it came from nowhere else or was asked for

Folders of the first format have no settings of the VAE: they are loaded with a warning that it may be another one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lmvae_fast.config.flow import BRIDGES, FlowConfig
from lmvae_fast.data.word_vectors import VectorSource, checked_source
from lmvae_fast.documents import read_object
from lmvae_fast.errors import CheckpointError, ConfigError, OutputError, shown
from lmvae_fast.files import (
    check_contents,
    files_inside,
    fsync_file,
    output_errors,
    recover_folder,
    replace_folder,
    sha256_file,
    share_as_folder,
    write_json,
    write_tensors,
)
from lmvae_fast.kernels.coupling_flow import Coupling, FlowSpec, Stage, Subnet
from lmvae_fast.models.bridge import Bridge
from lmvae_fast.models.flow import CouplingFlow
from lmvae_fast.models.flow_vectors import VECTORS, load_vectors, store_vectors
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.models.serialization import check_model_folder
from lmvae_fast.models.vae_identity import check_settings, vae_fingerprint, vae_settings, warn_of_unknown_settings
from lmvae_fast.tensor_files import check_finite, read_headers, read_tensors

CONFIG, WEIGHTS, FORMAT = "config.json", "flow.safetensors", "lmvae_fast-flow-2"

#: The formats that are read.
FORMATS = ("lmvae_fast-flow-1", FORMAT)

#: More stages than this are no flow that anybody fits.
MOST_STAGES = 10_000

Model = TypeVar("Model")

_CARD = """---
library_name: lmvae_fast
tags: [normalizing-flow, definition-modeling, text-generation]
---
# From word vectors to definitions

A flow ({blocks} blocks of kind `{kind}`) from word vectors of width {width} to the latents of a language-model VAE.

```python
import lmvae_fast as lf
model = lf.InvertibleCVAE.from_pretrained("<this folder>")
print(model.define(["planet"]))
```
"""


def spec_to_json(spec: FlowSpec) -> dict[str, Any]:
    """A flow's stages as JSON values; equal stages that follow each other are written once with their number."""
    stages: list[dict[str, Any]] = []
    for stage in spec.stages:
        values = asdict(stage)
        if stages and stages[-1]["stage"] == values:
            stages[-1]["times"] += 1
        else:
            stages.append({"times": 1, "stage": values})
    return {"dim": spec.dim, "cond_dim": spec.cond_dim, "stages": stages}


def spec_from_json(values: dict[str, Any]) -> FlowSpec:
    """The spec that :func:`spec_to_json` wrote. Raises CheckpointError for anything else."""
    try:
        stages: list[Stage] = []
        for entry in values["stages"]:
            coupling, rest = entry["stage"]["coupling"], {k: v for k, v in entry["stage"].items() if k != "coupling"}
            if coupling is not None:
                subnets = tuple(Subnet(tuple(net["hidden"]), net["activation"]) for net in coupling["subnets"])
                coupling = Coupling(**{**coupling, "subnets": subnets})
            times = entry["times"]
            if type(times) is not int or not 0 < times <= MOST_STAGES - len(stages):
                raise ValueError(f"{shown(times)} times a stage, of at most {MOST_STAGES} in all")
            stages += [Stage(coupling, **rest)] * times
        return FlowSpec(values["dim"], values["cond_dim"], tuple(stages))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the flow's stages cannot be read: {error}", remedy="restore config.json from a copy"
        ) from error


def flow_tensors(model: Any) -> dict[str, Tensor]:
    """Every number of a fitted model's flow, bridge and clusters, by name."""
    flow, bridge = model.flow, model.bridge
    return {
        "flow.theta": flow.theta.detach(), "flow.constants": flow.constants, "flow.indices": flow.indices,
        "bridge.mean": bridge.mean, "bridge.matrix": bridge.matrix, "bridge.explained": bridge.explained,
        "centres": model.centres,
    }  # fmt: skip


def load_flow_tensors(model: Any, tensors: dict[str, Tensor]) -> None:
    """Put such tensors back. Raises CheckpointError where they are of another flow, or their permutations are damaged."""
    wanted = flow_tensors(model)
    missing = sorted(wanted.keys() - tensors.keys())
    if missing:
        raise CheckpointError(
            "the flow's numbers are not whole", value=f"missing {missing}", remedy="restore them from a copy"
        )
    for name, value in wanted.items():
        if name != "centres" and tensors[name].shape != value.shape:
            raise CheckpointError(
                f"{name} is of another flow", value=list(tensors[name].shape), limit=list(value.shape),
                remedy="load it into a flow of the configuration it was saved with",
            )  # fmt: skip
    with torch.no_grad():
        for name, value in wanted.items():
            if name != "centres":
                value.copy_(tensors[name])
    if tensors["centres"].shape[1:] != model.centres.shape[1:]:
        raise CheckpointError(
            "the clusters' centres are of another width", value=list(tensors["centres"].shape),
            limit=["clusters", *model.centres.shape[1:]], remedy="restore the flow from a copy",
        )  # fmt: skip
    model.centres = tensors["centres"].to(model.device, model.dtype)
    try:
        model.flow.check_permutations()
    except ValueError as error:
        raise CheckpointError(
            f"the flow's permutations are damaged: {error}", remedy="restore it from a copy"
        ) from error


def save_flow(model: Any, folder: str | os.PathLike[str], *, include_vae: bool | None = None) -> None:
    """Write an InvertibleCVAE.

    Args:
        folder: made, or replaced if it holds a flow of ours; at every instant the old or the new one is whole.
        include_vae: store the VAE in it; default: only one that came from no folder or hub name, or lies in this very folder.

    Raises:
        ConfigError: it was not fitted, or not on vectors of the width of its own. OutputError: the folder cannot be written, or
            holds something else.
    """
    if model.bridge is None:
        raise ConfigError("this flow was not fitted yet, so there is nothing to save", remedy="call fit")
    if model.vectors is not None and model.vectors.dim != model.bridge.dim_in:
        raise ConfigError(
            "the model's word vectors are of another width than those the flow was fitted on", value=model.vectors.dim,
            limit=model.bridge.dim_in, remedy="give the model those it was fitted on, or None",
        )  # fmt: skip
    folder = Path(folder)
    recover_folder(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and _read_config(folder, None) is None:
        raise OutputError(f"{folder} exists and holds no flow of ours", remedy="choose another folder or empty it")
    if folder.exists():
        vae = folder / "vae"
        within = [f"vae/{name}" for name in files_inside(vae)]  # which is a folder of a model, and checked as one
        check_contents(folder, (CONFIG, WEIGHTS, VECTORS, "README.md", "vae"), within)
        if vae.is_dir():
            check_model_folder(vae)
    bridge = model.bridge
    with output_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        temporary.chmod(folder.parent.stat().st_mode & 0o777)  # mkdtemp makes it private
        try:
            write_tensors(temporary / WEIGHTS, flow_tensors(model), {"format": FORMAT})
            inside = _keeps_vae(model.source, folder) if include_vae is None else include_vae
            if inside:
                model.vae.save_pretrained(temporary / "vae")
            source = "./vae" if inside else _whole_path(model.source)
            values = {
                "format": FORMAT, "weights_sha256": sha256_file(temporary / WEIGHTS), "flow": model.config.to_dict(),
                "spec": spec_to_json(model.flow.spec), "clusters": list(model.clusters),
                "bridge": {"kind": bridge.kind, "dim_in": bridge.dim_in, "noise": bridge.noise},
                "vae": source, "vae_fingerprint": vae_fingerprint(model.vae), "vae_settings": vae_settings(model.vae),
                "vectors": store_vectors(model.vectors, model.vae, temporary),
            }  # fmt: skip
            write_json(temporary / CONFIG, values)
            card = _CARD.format(blocks=model.config.blocks, kind=model.config.kind, width=bridge.dim_in)
            (temporary / "README.md").write_text(card)
            for file in temporary.rglob("*"):
                if file.is_file():
                    share_as_folder(file)
                    fsync_file(file)
            replace_folder(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _whole_path(source: str | None) -> str | None:
    return str(Path(source).resolve()) if source is not None and Path(source).is_dir() else source


def _keeps_vae(source: str | None, folder: Path) -> bool:
    """Whether a flow's folder has to hold its VAE: it is nowhere else, or in what is about to be replaced."""
    return source is None or (Path(source).is_dir() and Path(source).resolve().is_relative_to(folder.resolve()))


def load_flow(
    cls: type[Model],
    folder: str | os.PathLike[str],
    *,
    vae: LMVAE | str | os.PathLike[str] | None = None,
    vectors: VectorSource | None = None,
) -> Model:
    """An InvertibleCVAE from a folder that :func:`save_flow` wrote, in evaluation mode.

    Args:
        cls: the class to make.
        vae: the VAE in memory, or where it is now; default: where it was.
        vectors: the word vectors it was fitted on; default: from where they came from. Those of other words go to ``define``.

    Raises:
        CheckpointError: nothing there, damaged, of another kind, or the VAE (or the vectors) are others than those the flow
            was fitted on. ConfigError: ``vae`` is neither a VAE nor a place. DataError: ``vectors`` are none.
            MissingPackageError: the package of its vectors is not installed.
    """
    folder = Path(folder)
    if vae is not None and not isinstance(vae, (LMVAE, str, os.PathLike)):
        raise ConfigError(
            "vae is no VAE and no place of one", value=shown(f"{type(vae).__name__} {vae!r}"),
            limit="an LMVAE, or its folder or hub name", remedy="leave it out for the VAE that the flow's folder names",
        )  # fmt: skip
    if vectors is not None:
        vectors = checked_source(vectors)
    recover_folder(folder)
    values, tensors = read_folder(folder)
    source: str | None = None
    if not isinstance(vae, LMVAE):
        vae, source = _load_vae(vae, values.get("vae"), folder)
    found = vae_fingerprint(vae)
    if found != values.get("vae_fingerprint"):
        raise CheckpointError(
            "the flow was fitted on another VAE, so its latents mean nothing to this one", value=found[:16],
            limit=str(values.get("vae_fingerprint"))[:16],
            remedy="give the VAE it was fitted on (unchanged, in the same dtype), or fit a new flow",
        )  # fmt: skip
    if values["format"] == FORMAT:
        check_settings(values.get("vae_settings"), vae)
    else:
        warn_of_unknown_settings(folder)
    try:
        config, bridge = FlowConfig.from_dict(values["flow"]), values["bridge"]
        spec = spec_from_json(values["spec"])
        made = _bridge(bridge, spec.dim)
        _check_sizes(spec, bridge, tensors)
        model: Any = cls(vae, CouplingFlow.from_spec(spec), config, source=source)  # type: ignore[call-arg]
        model.clusters = _labels(values["clusters"], tensors)
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / CONFIG} does not fit this version: {error}", remedy="restore it from a copy"
        ) from error
    model.bridge = made.to(device=model.device, dtype=model.dtype)
    load_flow_tensors(model, tensors)
    model.vectors = load_vectors(values.get("vectors"), vae, folder, vectors)
    if model.vectors is not None and model.vectors.dim != made.dim_in:
        raise CheckpointError(
            "the flow's bridge and its word vectors are of different widths", value=made.dim_in, limit=model.vectors.dim,
            remedy="restore config.json from a copy",
        )  # fmt: skip
    return model.eval()


def _load_vae(given: str | os.PathLike[str] | None, stored: Any, folder: Path) -> tuple[LMVAE, str | None]:
    """The VAE at the place given, or where the folder says; and that place, unless it is the folder itself."""
    if given is not None:
        place = os.fsdecode(given)
        return LMVAE.from_pretrained(place), place
    if not isinstance(stored, str) or not stored:
        raise CheckpointError(f"{folder} does not say where its VAE is", remedy="give vae=, the VAE or its folder")
    inside = stored.startswith("./")
    return LMVAE.from_pretrained(folder / stored if inside else stored), None if inside else stored


def _bridge(values: Any, dim: int) -> Bridge:
    """The bridge that config.json describes; ConfigError or TypeError where there is none like it."""
    kind, width, noise = values["kind"], values["dim_in"], values["noise"]
    if kind not in BRIDGES or kind == "auto" or type(width) is not int or width < 1:
        raise ConfigError(
            "there is no such bridge", value=f"{kind!r} of vectors of width {width!r}", limit=", ".join(BRIDGES)
        )
    if type(noise) not in (int, float) or not 0 < noise < float("inf"):
        raise ConfigError("what pads must be noise", value=shown(noise), limit="a number above 0")
    return Bridge.of_kind(kind, width, dim, noise=noise)


def _labels(values: Any, tensors: dict[str, Tensor]) -> tuple[str, ...]:
    rows = len(tensors["centres"])
    if not isinstance(values, list) or len(values) != rows or not all(isinstance(label, str) for label in values):
        raise ConfigError("clusters are not those of the flow", value=shown(values), limit=f"{rows} labels")
    return tuple(values)


def _check_sizes(spec: FlowSpec, bridge: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raises CheckpointError, before anything is made, where the configuration asks for other sizes than the file holds."""
    rows = bridge["dim_in"] if bridge["kind"] == "pca" else 0
    sizes = dict(zip(("flow.theta", "flow.constants", "flow.indices"), spec.sizes, strict=True))
    for name, size in {**sizes, "bridge.mean": rows}.items():
        if name in tensors and tensors[name].shape != (size,):
            raise CheckpointError(
                f"{name} is of another flow", value=list(tensors[name].shape), limit=[size],
                remedy="restore configuration and numbers from one copy",
            )  # fmt: skip


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a folder that :func:`save_flow` wrote; raises CheckpointError, as :func:`load_flow` does."""
    values = _read_config(folder, CheckpointError)
    assert values is not None
    return values, _read_weights(folder / WEIGHTS, values.get("weights_sha256"))


def _read_config(folder: Path, error_class: type[CheckpointError] | None) -> dict[str, Any] | None:
    """The configuration of a folder of ours; for any other None, or where a class of error is given that error."""
    try:
        values = read_object(folder / CONFIG, error=CheckpointError)
        if values.get("format") in FORMATS:
            return values
        problem = f"{folder} holds no flow of ours"
    except CheckpointError as error:
        problem = f"{folder / CONFIG} is missing or unreadable: {error}"
    if error_class is None:
        return None
    raise error_class(
        problem,
        limit=f"format {' or '.join(FORMATS)} in {CONFIG}",
        remedy="point to a folder that save_pretrained wrote",
    )


def _read_weights(path: Path, digest: str | None) -> dict[str, Tensor]:
    for name, header in read_headers(path).items():
        wanted = ("I32",) if name == "flow.indices" else ("F32", "F64")
        if header.dtype not in wanted:
            raise CheckpointError(f"{path}: {name} is of another dtype", value=header.dtype, limit=" or ".join(wanted))
    tensors = read_tensors(path)
    if sha256_file(path) != digest:
        raise CheckpointError(
            f"{path} is corrupt: its sha256 is not the one in {CONFIG}", remedy="restore it from a copy"
        )
    check_finite(tensors, path)
    return tensors
