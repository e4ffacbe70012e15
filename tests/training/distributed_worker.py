"""A rank of distributed tests. For every line ``RANK WORLD FOLDER`` on standard input it joins the others, runs the case in
FOLDER/case.json, writes FOLDER/result-RANK.json and answers with a line; so one process serves many tests."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from lmvae_fast.errors import LMVAEError
from lmvae_fast.models.sharded_tensors import in_pieces, whole
from lmvae_fast.testing import make_model
from lmvae_fast.training import train
from tests.training.helpers import StopAt, plain_sentences, prompt_pairs, settings


def strike(model: torch.nn.Module, step: int, what: str) -> None:
    """At the forward pass of a training step: ``die`` without a word, as a crash would; a ``signal``; or a ``nan`` weight."""
    done = 0

    def before(module: torch.nn.Module, arguments: tuple) -> None:
        nonlocal done
        done += module.training
        if done == step and what == "die":
            os._exit(9)
        if done == step and what == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if done == step and what == "nan":
            module.posterior_head.weight.data.fill_(float("nan"))

    model.register_forward_pre_hook(before)


def run(case: dict, rank: int) -> dict:
    """Train as the case says and return what is compared."""
    torch.set_num_threads(1)
    prompted = case.get("model", {}).get("system") == "cvae"
    data = prompt_pairs(9) if prompted else plain_sentences(case.get("sentences", 26))
    if rank == case.get("other_data"):
        data = data[1:]
    changes = dict(case.get("train", {}))
    if rank == case.get("other_config"):
        changes["learning_rate"] = 0.5
    # another seed on each rank: what trains must come from rank 0
    options = {"projector_dropout": 0.0 if prompted else 0.2, **case.get("model", {})}
    model = make_model(seed=rank, dtype=getattr(torch, case.get("dtype", "float64")), **options)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # of fine-tuned models: drawn by torch, for as many tokens as a rank has
    config = settings(Path(case["output"]), **{"batch_size": 6, "learning_rate": 0.001, "log_every": 1, **changes})
    callbacks = [StopAt(*case["stop_at"])] if case.get("stop_at") else []
    if rank == case.get("struck_rank"):
        strike(model, case["at"], case["by"])
    elements = sum(p.numel() for p in model.decoder.body.h.parameters()) if config.shard else 0
    result = train(model, data, prompt_pairs(4, seed=1) if prompted else plain_sentences(10, seed=1), config, callbacks)
    sharding = {}
    if config.shard:
        layers = list(model.decoder.body.h.parameters())
        sharding = {
            "layer_elements": elements, "adapter_elements": sum(p.numel() for p in layers if not in_pieces(p)),
            "local_layer_elements": sum(p.to_local().numel() for p in layers if in_pieces(p)),
        }  # fmt: skip
    save_file(
        {name: whole(value).contiguous() for name, value in model.trainable_state_dict().items()},
        Path(case["folder"]) / f"weights-{rank}.safetensors",
    )
    return {
        "stop_reason": result.stop_reason, "step": result.step, "tokens": result.tokens, "history": result.history,
        "checkpoint": str(result.checkpoint), **sharding,
    }  # fmt: skip


def serve(rank: int, world: int, folder: Path) -> None:
    case = json.loads((folder / "case.json").read_text())
    case["folder"] = str(folder)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        found = run(case, rank)
    except LMVAEError as error:
        found = {"error": type(error).__name__, "message": str(error)}
    except Exception:
        found = {"error": "crash", "message": traceback.format_exc()}
    (folder / f"result-{rank}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    for line in sys.stdin:
        number, count, where = line.split(maxsplit=2)
        serve(int(number), int(count), Path(where.strip()))
        print("done", flush=True)
