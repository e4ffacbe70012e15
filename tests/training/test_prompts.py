"""Training on prompts with responses: whole groups in every batch, each response once an epoch, resumable to the bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lmvae_fast.data import PromptResponse
from lmvae_fast.errors import ConfigError
from lmvae_fast.models.latents import draw_latents
from lmvae_fast.models.systems.cvae import objective_of
from lmvae_fast.testing import make_model
from lmvae_fast.text.batch import Share
from lmvae_fast.training import train
from lmvae_fast.training.batch_plan import bounds_of, groups_of, plan_epoch, sorted_batches, steps_per_epoch
from lmvae_fast.training.feature_cache import TensorCache, tokenized_sentences
from lmvae_fast.training.validation import validate
from tests.training.helpers import StopAt, assert_same_checkpoint, assert_same_history, prompt_pairs, settings


def make(**config):
    return make_model("llama", **{"system": "cvae", "latent_dim": 6, "group_size": 3, "queries": 2, **config})


@pytest.fixture(scope="module")
def tokenized():
    return make().tokenize(prompt_pairs(23))


@pytest.mark.parametrize(("batch_size", "accumulation"), [(3, 1), (6, 1), (6, 2), (2, 3), (100, 1)])
def test_every_response_once_in_whole_groups(tokenized, batch_size, accumulation):
    groups = groups_of(tokenized, batch_size)
    assert groups.per_batch == max(1, batch_size // 3)
    for epoch in range(3):
        plan = plan_epoch(
            tokenized.lengths,
            batch_size,
            seed=1,
            epoch=epoch,
            accumulation=accumulation,
            bucket_batches=2,
            groups=groups,
        )
        assert len(plan) == steps_per_epoch(len(tokenized), batch_size, accumulation, groups)
        batches = list(itertools.chain(*plan.steps))
        rows = np.concatenate(batches)
        assert sorted(rows.tolist()) == list(range(len(tokenized)))
        for batch in batches:
            bounds = bounds_of(tokenized, batch)
            assert bounds[0] == 0 and bounds[-1] == len(batch)
            own = [tokenized.groups[row] for row in batch]
            for first, end in itertools.pairwise(bounds):
                whole = [row for row in range(len(tokenized)) if tokenized.groups[row] == own[first]]
                assert sorted(batch[first:end].tolist()) == whole and len(set(own[first:end])) == 1
            assert len(bounds) - 1 <= groups.per_batch


def test_epochs_and_seeds_differ_and_are_reproduced(tokenized):
    def order(seed, epoch):
        plan = plan_epoch(tokenized.lengths, 6, seed=seed, epoch=epoch, groups=groups_of(tokenized, 6))
        return np.concatenate(list(itertools.chain(*plan.steps))).tolist()

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(rows) for rows in orders}) == 4 and order(1, 0) == orders[2]


def test_both_slices_of_a_prompt_fall_into_one_step():
    """As in the published recipe: 6 responses a prompt in slices of 3, two slices a step."""
    sentences = make().tokenize(_equal_prompts(8, 6))
    plan = plan_epoch(sentences.lengths, 3, seed=0, epoch=0, accumulation=2, groups=groups_of(sentences, 3))
    for step in plan.steps:
        assert len(step) == 2
        assert len({sentences.prompts[row] for batch in step for row in batch}) == 1
        first, second = (sorted(batch.tolist()) for batch in step)
        assert {first[0] % 6, second[0] % 6} == {0, 1} and [row - first[0] for row in first] == [0, 2, 4]


def _equal_prompts(prompts, responses):
    words = ["sun", "moon", "ice", "water", "cat", "stone", "plant", "food"]
    return [PromptResponse(words[p], f" {words[r]} is a star") for p in range(prompts) for r in range(responses)]


def test_batches_of_an_evaluation_hold_whole_groups(tokenized):
    batches = sorted_batches(tokenized.lengths, 6, groups_of(tokenized, 6))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(tokenized)))
    longest = [max(tokenized.lengths[row] for row in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_ranks_share_groups():
    bounds = (0, 2, 3, 6, 7)
    shares = [Share(rank, 2, 7, bounds) for rank in range(2)]
    assert [share.rows for share in shares] == [[0, 1, 3, 4, 5], [2, 6]] and [share.count for share in shares] == [5, 2]
    idle = Share(2, 3, 3, (0, 2, 3))
    assert idle.rows == [0, 1] and idle.count == 0


def test_groups_that_are_split_over_processes_are_refused():
    model = make()
    batch = model.make_batch(model.tokenize(prompt_pairs(3)))
    batch.share = Share(0, 2, 20)
    with pytest.raises(ConfigError, match="responses of a prompt are split"):
        draw_latents(model.config, model.encode(batch), batch, beta=1.0, noise=None, seed=0)


def test_tokenised_prompts_are_cached(tmp_path):
    model, cache = make(), TensorCache(tmp_path)
    data = prompt_pairs(5)
    first = tokenized_sentences(model, data, cache, on_long="truncate")
    assert tokenized_sentences(model, data, cache, on_long="truncate") == first and len(list(tmp_path.iterdir())) == 1
    assert first == model.tokenize(data)
    model.config = model.config.replace(group_size=2)
    assert tokenized_sentences(model, data, cache, on_long="truncate").groups != first.groups


@pytest.mark.parametrize("options", [{}, {"output_residual": "none", **objective_of("BOW-VAE")[0], "stage": 0}])
def test_a_stopped_run_goes_on_to_the_bit(tmp_path, options):
    def run(folder, *callbacks, **changes):
        config = settings(
            tmp_path / folder, max_steps=6, batch_size=6, save_every=3, learning_rate=1e-2, log_every=1,
            keep_checkpoints=9, **changes,
        )  # fmt: skip
        return train(make(**options), prompt_pairs(9), prompt_pairs(4, seed=1), config, callbacks)

    whole = run("whole")
    run("parts", StopAt(2))
    again = run("parts", resume=True)
    assert again.step == whole.step == 6
    assert_same_checkpoint(whole.checkpoint, again.checkpoint)
    assert_same_history(tmp_path / "whole", tmp_path / "parts")


def test_training_lowers_the_loss(tmp_path):
    torch.manual_seed(0)
    model = make()
    config = settings(
        tmp_path, max_steps=30, batch_size=12, learning_rate=1e-2, schedule="constant", **objective_of("DG-VAE")[1]
    )
    data = prompt_pairs(9)
    sentences = model.tokenize(data)
    before = validate(model, sentences, None, batch_size=12, beta=1.0)
    train(model, data, None, config)
    after = validate(model, sentences, None, batch_size=12, beta=1.0)
    assert after["loss"] < 0.9 * before["loss"]
    lengths = zip(sentences.ids, sentences.prompt_lengths, strict=True)
    responses = sum(min(len(ids) - prompt + 1, model.config.max_len) for ids, prompt in lengths)
    assert after["reconstruction"] / after["reconstruction_per_token"] * len(sentences) == pytest.approx(responses)
