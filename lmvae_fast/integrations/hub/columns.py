"""Columns for `datasets.map`, a collator and a schedule of the KL's weight for transformers' `Trainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from lmvae_fast.config import TrainConfig
from lmvae_fast.errors import DataError
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.text.batch import IGNORED
from lmvae_fast.training.schedule import beta_at

Columns = Callable[[Mapping[str, Sequence[Any]]], dict[str, list[Any]]]


def encode_columns(model: LMVAE, column: str = "text") -> Columns:
    """A function for ``dataset.map(..., batched=True)``: adds ``mu`` and ``logvar``, ``latent_dim`` floats a row.

    It raises DataError for a column that is not there or an empty sentence.
    """

    def add(rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        posterior = model.encode(_texts(rows, column))
        return {"mu": posterior.mu.tolist(), "logvar": posterior.logvar.tolist()}

    return add


def tokenize_columns(model: LMVAE, column: str = "text") -> Columns:
    """A function for ``dataset.map(..., batched=True)``: adds ``input_ids``, the decoder's ids, cut to max_len.

    It raises DataError for a column that is not there or an empty sentence.
    """

    def add(rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        return {"input_ids": model.tokenize(_texts(rows, column), on_empty="error").ids}

    return add


class Collator:
    """Rows with ``input_ids`` to a batch for ``PretrainedLMVAE``: ids, mask and labels, int64 ``[B, S]``, padded at the right.

    model: whose decoder's padding token is used.
    """

    def __init__(self, model: LMVAE):
        self.pad_token_id = model.decoder.tokenizer.pad_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids = [[int(token) for token in row["input_ids"]] for row in rows]
        longest = max(map(len, ids))

        def padded(lists: list[list[int]], value: int) -> Tensor:
            return torch.tensor([row + [value] * (longest - len(row)) for row in lists])

        return {
            "input_ids": padded(ids, self.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "labels": padded(ids, IGNORED),
        }


class BetaSchedule(TrainerCallback):
    """Sets ``model.lmvae.beta`` before every step of a Trainer, as :func:`lmvae_fast.train` would.

    config: its ``beta_schedule``, ``beta``, ``beta_cycles``, ``beta_zero`` and ``beta_increase`` are read.
    """

    def __init__(self, config: TrainConfig | None = None):
        self.config = config or TrainConfig()

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.lmvae.beta = beta_at(state.global_step, state.max_steps, self.config)


def _texts(rows: Mapping[str, Sequence[Any]], column: str) -> list[str]:
    if column not in rows:
        raise DataError("the data set has no such column", value=column, limit=", ".join(rows))
    return list(rows[column])
