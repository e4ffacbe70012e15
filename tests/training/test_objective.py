"""The objective's arithmetic against the systems' formulas, written out."""

import pytest
import torch

from lmvae_fast.errors import ConfigError
from lmvae_fast.models.objective import combine, kl_per_dim, kl_reduce, segment_sum


@pytest.fixture
def terms():
    return torch.tensor([4.0, 9.0, 2.0]), torch.tensor([2, 3, 1]), torch.tensor([1.0, 0.5, 3.0])


def test_kl_per_dim_equals_torchs_divergence():
    mu, logvar = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mu, (0.5 * logvar).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(kl_per_dim(mu, logvar), expected, rtol=1e-12, atol=1e-12)
    assert kl_per_dim(mu.half(), logvar.half()).dtype == torch.float32


def test_kl_per_dim_keeps_its_digits_near_the_prior():
    logvar = torch.full((1, 1), 1e-4)
    assert kl_per_dim(torch.zeros(1, 1), logvar).item() == pytest.approx(1e-8 / 4, rel=1e-3)


def test_kl_reduce_by_hand():
    kl = torch.tensor([[0.1, 0.6, 1.0], [0.4, 0.1, 0.2]])
    assert kl_reduce(kl).tolist() == pytest.approx([1.7, 0.7])
    assert kl_reduce(kl, "dim_threshold", 0.5).tolist() == pytest.approx([1.6, 0.0])
    assert kl_reduce(kl, "free_bits", 0.5).tolist() == pytest.approx([2.1, 1.5])
    assert kl_reduce(kl, "sample_threshold", 0.7000001).tolist() == pytest.approx([1.7, 0.0])
    with pytest.raises(ConfigError, match="unknown KL mode"):
        kl_reduce(kl, "sometimes")


def test_thresholds_are_strict():
    """KL equal to the target is dropped, as both published trainers do."""
    kl = torch.tensor([[0.5, 0.25]])
    assert kl_reduce(kl, "dim_threshold", 0.5).item() == 0.0
    assert kl_reduce(kl, "sample_threshold", 0.75).item() == 0.0


@pytest.mark.parametrize("as_tensor", [False, True])
def test_optimus_masks_nothing_while_beta_is_zero(as_tensor):
    kl = torch.tensor([[0.1, 0.6]])
    beta = (lambda value: torch.tensor(value)) if as_tensor else float
    assert kl_reduce(kl, "dim_threshold", 0.5, beta=beta(0.0)).item() == pytest.approx(0.7)
    assert kl_reduce(kl, "dim_threshold", 0.5, beta=beta(0.1)).item() == pytest.approx(0.6)


def test_gradients_of_the_modes():
    """A masked dimension has no gradient; one lifted by free bits has none either."""
    kl = torch.tensor([[0.1, 0.6]], requires_grad=True)
    for mode in ("dim_threshold", "free_bits"):
        (gradient,) = torch.autograd.grad(kl_reduce(kl, mode, 0.5).sum(), kl)
        assert gradient.tolist() == [[0.0, 1.0]]


def test_combine_elbo(terms):
    nll, tokens, kl = terms
    out = combine(nll, tokens, kl, 0.5)
    assert out.loss.item() == pytest.approx((4 + 9 + 2 + 0.5 * 4.5) / 3)
    assert out.reconstruction.tolist() == [4.0, 9.0, 2.0]
    out = combine(nll, tokens, kl, torch.tensor(2.0), length_normalize=True)
    assert out.loss.item() == pytest.approx((2 + 3 + 2 + 2 * 4.5) / 3)


def test_combine_langvae(terms):
    nll, tokens, kl = terms
    out = combine(nll, tokens, kl, 1.0, objective="langvae-0.6")
    assert out.reconstruction.tolist() == pytest.approx([15 * 2 / 3, 15 * 3 / 3, 15 * 1 / 3])
    assert out.loss.item() == pytest.approx((10 + 15 + 5 + 4.5) / 3)


def test_combine_refuses(terms):
    with pytest.raises(ConfigError, match="length_normalize contradicts"):
        combine(*terms, 1.0, objective="langvae-0.6", length_normalize=True)
    with pytest.raises(ConfigError, match="unknown objective"):
        combine(*terms, 1.0, objective="mse")


def test_segment_sum():
    values = torch.randn(2, 10, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 3, 3, 10], dtype=torch.int32)
    expected = torch.stack([values[:, 0:3].sum(1), torch.zeros(2, dtype=torch.float64), values[:, 3:].sum(1)], 1)
    torch.testing.assert_close(segment_sum(values, cu_seqlens), expected)
    torch.testing.assert_close(segment_sum(values[0], cu_seqlens), expected[0])
    torch.autograd.gradcheck(lambda v: segment_sum(v, cu_seqlens), (values[0].detach().requires_grad_(),))
