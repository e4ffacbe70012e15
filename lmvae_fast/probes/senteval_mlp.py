"""SentEval's own classifier: a linear layer or one hidden sigmoid layer, trained with Adam and stopped by the validation part.

Source: SentEval (arXiv 1803.05449) and Conneau et al. 2018 (arXiv 1805.01070), section 4: batches of 64, epochs taken four at
a time, stopped after five rounds without gain or 200 epochs; L2 penalty chosen on the validation part.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmvae_fast.probes import checks
from lmvae_fast.probes.linguistic import _labels, split
from lmvae_fast.probes.results import Score

#: L2 penalties that the validation part chooses from.
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)


def evaluate_mlp(
    x: Any,
    y: Any,
    part: Sequence[str],
    *,
    hidden: int = 50,
    dropout: float = 0.0,
    penalties: Sequence[float] = PENALTIES,
    batch_size: int = 64,
    epoch_size: int = 4,
    tenacity: int = 5,
    max_epochs: int = 200,
    seed: int = 1111,
) -> Score:
    """Test accuracy of SentEval's classifier. 0 to 1.

    Args:
        x, y, part: as :func:`lmvae_fast.probes.linguistic.evaluate`.
        hidden: units of the sigmoid layer; 0 for none. The paper searched 50, 100 and 200. dropout: before both layers'
            outputs; it searched 0, 0.1 and 0.2.
        penalties: L2 penalties; on a tie the larger.
        batch_size, epoch_size, tenacity, max_epochs: of training: rounds of ``epoch_size`` epochs, at most ``tenacity``
            without a better validation accuracy.
        seed: of initial weights, order and dropout; torch's own generator is left as it was.
    """
    matrix = checks.latents(x, name="x")
    checks.whole("hidden", hidden, 0)
    checks.whole("seed", seed, 0)
    rows = split(part, len(matrix))
    classes, coded = np.unique(_labels(y, rows, len(matrix)), return_inverse=True)
    inputs, targets = torch.from_numpy(matrix).float(), torch.from_numpy(coded)
    parts = {name: (inputs[chosen], targets[chosen]) for name, chosen in rows.items()}
    by_penalty = {}
    with torch.random.fork_rng(devices=[]):
        for penalty in sorted(penalties):
            torch.manual_seed(seed)
            model = _network(inputs.shape[1], hidden, len(classes), dropout)
            _train(model, parts, penalty, batch_size, epoch_size, tenacity, max_epochs)
            by_penalty[penalty] = {name: _accuracy(model, *columns) for name, columns in parts.items()}
    best = max(by_penalty, key=lambda penalty: (by_penalty[penalty]["va"], penalty))
    return Score(
        by_penalty[best]["te"],
        choices={"classifier": f"SentEval's, {hidden} hidden units" if hidden else "SentEval's, linear", "l2": best,
                 "dropout": dropout, "penalties": tuple(penalties), "rows": {name: len(r) for name, r in rows.items()}},
        seed=seed,
        details={"by_penalty": by_penalty},
    )  # fmt: skip


def _network(width: int, hidden: int, classes: int, dropout: float) -> nn.Sequential:
    if not hidden:
        return nn.Sequential(nn.Linear(width, classes))
    return nn.Sequential(nn.Linear(width, hidden), nn.Dropout(dropout), nn.Sigmoid(), nn.Linear(hidden, classes))


def _train(
    model: nn.Sequential,
    parts: dict[str, tuple[Tensor, Tensor]],
    penalty: float,
    batch_size: int,
    epoch_size: int,
    tenacity: int,
    max_epochs: int,
) -> None:
    """Trains in place; the model ends with the weights of its best validation accuracy."""
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=penalty)
    inputs, targets = parts["tr"]
    best, best_state, without_gain, epochs = -1.0, copy.deepcopy(model.state_dict()), 0, 0
    while without_gain < tenacity and epochs < max_epochs:
        model.train()
        for _ in range(epoch_size):
            for chosen in torch.randperm(len(inputs)).split(batch_size):
                optimizer.zero_grad(set_to_none=True)
                nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
                optimizer.step()
        epochs += epoch_size
        found = _accuracy(model, *parts["va"])
        if found > best:
            best, best_state, without_gain = found, copy.deepcopy(model.state_dict()), 0
        else:
            without_gain += 1
    model.load_state_dict(best_state)


@torch.no_grad()
def _accuracy(model: nn.Sequential, inputs: Tensor, targets: Tensor) -> float:
    model.eval()
    return float((model(inputs).argmax(dim=1) == targets).double().mean())
