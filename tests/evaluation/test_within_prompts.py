"""Figures within prompts against their formulas, prompt by prompt in a loop."""

from __future__ import annotations

import math

import pytest
import torch

from lmvae_fast.errors import DataError
from lmvae_fast.evaluation import within_prompts
from lmvae_fast.models.objective import kl_per_dim

PROMPTS = [3, 7, 3, 3, 7, 7, 7, 1]


def test_every_figure_is_its_formula_prompt_by_prompt():
    mu, logvar = 0.4 * torch.randn(8, 5), 0.3 * torch.randn(8, 5) - 1.0
    found = within_prompts(mu, logvar, PROMPTS, samples=4000)
    expected = dict.fromkeys(["kl", "active_units_0.03", "active_units_0.1", "active_units_0.3"], 0.0)
    information, gaps = [], []
    for prompt in (1, 3, 7):
        rows = [row for row, own in enumerate(PROMPTS) if own == prompt]
        m, lv = mu[rows].double(), logvar[rows].double()
        expected["kl"] += float(kl_per_dim(m, lv).sum(1).mean()) / 3
        for threshold in (0.03, 0.1, 0.3):
            active = int((m.var(0) > threshold).sum()) if len(rows) > 1 else 0
            expected[f"active_units_{threshold:g}"] += active / 3
        z = m + torch.exp(0.5 * lv) * torch.randn(4000, len(rows), 5, dtype=torch.float64)
        pairs = torch.distributions.Normal(m, torch.exp(0.5 * lv)).log_prob(z[:, :, None])  # [M, N, N, D]
        own = torch.diagonal(pairs, dim1=1, dim2=2).movedim(-1, 1)  # [M, N, D]
        joint = torch.logsumexp(pairs.sum(-1), 2) - math.log(len(rows))
        marginal = torch.logsumexp(pairs, 2) - math.log(len(rows))
        information.append([float((own.sum(-1) - joint).mean()), float((own - marginal).sum(-1).mean())])
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(z)
        gaps.append((marginal - prior).mean((0, 1)))
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9), name
    both = torch.tensor(information).mean(0)  # of other draws: 12,000 each
    assert found["mutual_information"] == pytest.approx(float(both[0]), abs=0.03)
    assert found["marginal_mutual_information"] == pytest.approx(float(both[1]), abs=0.05)
    for threshold in (0.03, 0.1, 0.3):
        near = [float((abs(gap - threshold) < 0.02).sum()) for gap in gaps]
        wanted = sum(float((gap < threshold).sum()) for gap in gaps) / 3
        assert abs(found[f"collapsed_units_{threshold:g}"] - wanted) <= sum(near) / 3
    assert (found["prompts"], found["single"]) == (3, 1)


def test_a_prompt_that_separates_its_responses_and_one_that_does_not():
    apart = 100.0 * torch.arange(4.0)[:, None].repeat(1, 3)
    mu, logvar = torch.cat([apart, torch.zeros(2, 3)]), torch.zeros(6, 3)
    found = within_prompts(mu, logvar, [0, 0, 0, 0, 1, 1], min_var=0.0)
    assert found["mutual_information"] == pytest.approx(math.log(4) / 2)
    assert found["marginal_mutual_information"] == pytest.approx(3 * math.log(4) / 2)
    assert found["active_units_0.1"] == 1.5 and found["collapsed_units_0.3"] == 1.5


def test_draws_go_by_the_row_and_rows_may_come_in_any_order():
    mu, logvar = torch.randn(8, 5), -torch.ones(8, 5)
    first = within_prompts(mu, logvar, PROMPTS, seed=4)
    assert first == within_prompts(mu, logvar, PROMPTS, seed=4)
    assert first != within_prompts(mu, logvar, PROMPTS, seed=5)
    assert first == within_prompts(mu, logvar, [{3: 30, 7: 70, 1: 10}[prompt] for prompt in PROMPTS], seed=4)


@pytest.mark.parametrize(("rows", "ids"), [(8, 7), (0, 0)])
def test_posteriors_and_prompts_that_do_not_fit(rows, ids):
    with pytest.raises(DataError, match="do not fit"):
        within_prompts(torch.zeros(rows, 2), torch.zeros(rows, 2), list(range(ids)))
