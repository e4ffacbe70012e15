"""normflows and nflows as our flow: values, log-determinants and inverses; what cannot be expressed is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lmvae_fast.errors import ConfigError
from lmvae_fast.integrations.normalizing_flows import from_nflows, from_normflows


def stirred(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.double()


@pytest.mark.parametrize("dim", [6, 7])
def test_normflows(dim):
    nf = pytest.importorskip("normflows")
    half, rest = dim - dim // 2, dim // 2
    flows = [
        nf.flows.AffineCouplingBlock(nf.nets.MLP([half, 12, 2 * rest])),
        nf.flows.Permute(dim, mode="shuffle"),
        nf.flows.AffineCouplingBlock(nf.nets.MLP([rest, 12, 8, 2 * half]), split_mode="channel_inv"),
        nf.flows.Permute(dim, mode="swap"),
        nf.flows.ActNorm((dim,)),
        nf.flows.AffineCouplingBlock(nf.nets.MLP([half, 12, rest]), scale=False),
        nf.flows.AffineConstFlow((dim,)),
    ]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(dim), flows)
    model.forward(torch.randn(50, dim))
    stirred(model)
    x = torch.randn(5, dim, dtype=torch.float64)
    want, logdet = model.forward_and_log_det(x)
    flow = from_normflows(model)
    got = flow(x)
    torch.testing.assert_close(got[0], want)
    torch.testing.assert_close(got[1], logdet.double(), rtol=1e-5, atol=1e-5)  # theirs adds up in fp32
    back, logdet = model.inverse_and_log_det(x)
    got = flow.inverse(x)
    torch.testing.assert_close(got[0], back)
    torch.testing.assert_close(got[1], logdet.double(), rtol=1e-5, atol=1e-5)  # theirs adds up in fp32


def test_what_normflows_has_and_we_do_not():
    nf = pytest.importorskip("normflows")
    net = nf.nets.MLP([2, 8, 4])
    for flows, message in (
        ([nf.flows.AffineCouplingBlock(net, scale_map="sigmoid")], "scale_map"),
        ([nf.flows.AffineCouplingBlock(net, split_mode="checkerboard")], "split_mode"),
        ([nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4], leaky=0.1))], "LeakyReLU"),
        ([nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4], output_fn="tanh"))], "end in a Linear"),
        ([nf.flows.ActNorm((4,))], "has not seen data"),
        ([nf.flows.Permute(4), nf.flows.Planar((4,))], "flow 1 cannot be converted.*Planar"),
        ([], "none of the flows"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_normflows(flows)


class Net(nn.Sequential):
    """nflows hands a context to its nets."""

    def forward(self, x, context=None):
        return super().forward(x)


def net(c_in: int, c_out: int) -> Net:
    return Net(nn.Linear(c_in, 12), nn.SiLU(), nn.Linear(12, c_out))


def test_nflows():
    transforms = pytest.importorskip("nflows.transforms")

    class Exponential(transforms.AffineCouplingTransform):
        def _scale_and_shift(self, params):
            n = self.num_transform_features
            return params[:, n:].exp(), params[:, :n]

    parts = [
        Exponential([0, 1, 0, 1, 0], net),
        transforms.RandomPermutation(5),
        transforms.ActNorm(5),
        transforms.AdditiveCouplingTransform([1, 1, 0, 0, 0], net),
        transforms.ReversePermutation(5),
        Exponential([0, 0, 0, 1, 1], net),
    ]
    whole = transforms.CompositeTransform(parts)
    whole(torch.randn(50, 5))
    stirred(whole)
    x = torch.randn(4, 5, dtype=torch.float64)
    flow = from_nflows(whole)
    for got, want in ((flow(x), whole(x)), (flow.inverse(x), whole.inverse(x))):
        torch.testing.assert_close(got[0], want[0])
        torch.testing.assert_close(got[1], want[1])


def test_what_nflows_has_and_we_do_not():
    transforms = pytest.importorskip("nflows.transforms")
    nets = pytest.importorskip("nflows.nn.nets")

    def residual(c_in, c_out):
        return nets.ResidualNet(c_in, c_out, hidden_features=8)

    for transform, message in (
        (transforms.AffineCouplingTransform([0, 1], net), "scale is not exp"),
        (transforms.AdditiveCouplingTransform([0, 1], residual), "no MLP"),
        (transforms.CompositeTransform([transforms.RandomPermutation(4), transforms.ActNorm(4)]), "has not seen data"),
        (transforms.CompositeTransform([transforms.RandomPermutation(4), transforms.SVDLinear(4, 2)]), "SVDLinear"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_nflows(transform)
