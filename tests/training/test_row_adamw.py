"""An embedding updated by the rows that have had a gradient: torch's AdamW, where that is exact, and refused elsewhere."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lmvae_fast.errors import CheckpointError, ConfigError
from lmvae_fast.testing import make_model
from lmvae_fast.training.loop import Trainer
from lmvae_fast.training.row_adamw import RowAdamW
from tests.training.helpers import StopAt, plain_sentences, run, settings

OPTIONS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}
BATCHES = [[1, 3, 3, 7], [2], [1, 1, 1], [], [9, 3], [9], [0, 5, 7, 7]]


def pair(dtype=torch.float64):
    torch.manual_seed(0)
    one = nn.Embedding(12, 5, dtype=dtype)
    other = nn.Embedding(12, 5, dtype=dtype)
    other.load_state_dict(one.state_dict())
    return one, other


def backward(module, ids, step):
    weights = torch.randn(len(ids), 5, generator=torch.Generator().manual_seed(step)).to(module.weight)
    (module(torch.tensor(ids, dtype=torch.int64)) * weights).sum().backward()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_every_row_is_where_adamw_puts_it(dtype, tolerance):
    """Rows that come and go, rows twice in a batch, an empty batch, clipping, another learning rate half-way."""
    module, dense = pair(dtype)
    ours, theirs = RowAdamW(module, **OPTIONS), torch.optim.AdamW(dense.parameters(), weight_decay=0.0, **OPTIONS)
    with ours.attached():
        for step, ids in enumerate(BATCHES * 3):
            backward(module, ids, step)
            backward(dense, ids, step)
            assert module.weight.grad.is_sparse and not dense.weight.grad.is_sparse
            torch.testing.assert_close(ours.norm_sq(), dense.weight.grad.square().sum())
            clip = torch.tensor(0.3 if step % 2 else 1.0, dtype=dtype)
            dense.weight.grad.mul_(clip)
            ours.lr = theirs.param_groups[0]["lr"] = 0.05 if step < 9 else 0.02
            ours.step(clip)
            theirs.step()
            ours.zero_grad()
            theirs.zero_grad()
            torch.testing.assert_close(module.weight, dense.weight, rtol=tolerance, atol=tolerance)
    assert not module.sparse and sorted(ours.rows.tolist()) == [0, 1, 2, 3, 5, 7, 9]
    untouched = [4, 6, 8, 10, 11]
    assert torch.equal(module.weight[untouched], pair(dtype)[0].weight[untouched])
    state = theirs.state[dense.weight]
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(ours.tensors()[name], state[name], rtol=tolerance, atol=tolerance)
    assert ours.tensors()["step"] == state["step"]


def test_it_goes_on_from_its_state():
    first, second = pair()
    whole, parts = RowAdamW(first, **OPTIONS), RowAdamW(second, **OPTIONS)
    for step, ids in enumerate(BATCHES):
        for optimizer, module in ((whole, first), (parts, second)):
            backward(module, ids, step)  # dense gradients, outside of `attached`, are taken too
            optimizer.step()
            optimizer.zero_grad()
        if step == 3:
            state, parts = parts.tensors(), RowAdamW(second, **OPTIONS)
            parts.restore(state)
    assert torch.equal(first.weight, second.weight)
    with pytest.raises(CheckpointError, match="another shape"):
        parts.restore({**state, "exp_avg": torch.zeros(3, 5)})


MODEL = {"system": "llamavae", "family": "llama", "max_len": 12}
RUN = {"max_steps": 8, "learning_rate": 0.01, "evaluated": False, "batch_size": 4, "grad_clip": 0.5, "save_every": 4}


def test_a_run_is_that_of_adamw_and_goes_on_to_the_bit(tmp_path):
    results, models = [], []
    for name, rows in (("rows", True), ("plain", False)):
        models.append(make_model(**MODEL))
        results.append(run(tmp_path / name, model=models[-1], **RUN, embedding_rows_update=rows))
    start = dict(make_model(**MODEL).named_parameters())
    for (name, got), want in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if want.requires_grad:
            assert (got - want).norm() < 1e-3 * (want - start[name]).norm(), name
    first, second = (load_file(result.checkpoint / "optimizer.safetensors") for result in results)
    assert first.keys() == second.keys()
    run(tmp_path / "parts", StopAt(3), model=make_model(**MODEL), **RUN, embedding_rows_update=True)
    again = make_model(**MODEL)
    run(tmp_path / "parts", model=again, **RUN, embedding_rows_update=True, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), again.parameters(), strict=True))
    assert not again.decoder.model.get_input_embeddings().sparse


@pytest.mark.parametrize(
    ("model", "train", "says"),
    [
        (MODEL, {"weight_decay": 0.01}, "moves every row"),
        ({**MODEL, "family": "gpt2"}, {}, "head's weight too"),
        ({"family": "llama", "max_len": 12}, {}, "does not train"),
        (MODEL, {"precision": "fp16"}, "fp16"),
    ],
)
def test_what_would_not_be_exact_is_refused(tmp_path, model, train, says):
    config = settings(tmp_path, embedding_rows_update=True, **train)
    with pytest.raises(ConfigError, match=says):
        Trainer(make_model(**model), plain_sentences(8), None, config, ())
