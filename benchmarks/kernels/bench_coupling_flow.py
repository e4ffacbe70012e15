"""coupling_flow against FrEIA 0.2: 10 blocks, dim 128, subnets with one hidden layer of 512, the same numbers on both sides.

Where FrEIA is not installed the baseline is the op's own reference in plain torch, and called so in the record: nearly the
same flow (GLOW with ActNorm and a permutation after each block), to which the floors do not apply.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.kernels.harness import Case
from lmvae_fast.integrations.freia import convert
from lmvae_fast.kernels.coupling_flow import reference
from lmvae_fast.models.flow import CouplingFlow

DIM, HIDDEN, BLOCKS = 128, 512, 10
FREIA = find_spec("FrEIA") is not None
BASELINE = "FrEIA" if FREIA else "plain torch"
# Multiply-adds per row and stage: [64 -> 512 -> 128]. AllInOne has one such subnet per block, GLOW two.
KINDS = {"AllInOneBlock": "allinone", "GLOWCouplingBlock": "glow"}
MACS = {"AllInOneBlock": BLOCKS * (64 * 512 + 512 * 128), "GLOWCouplingBlock": 2 * BLOCKS * (64 * 512 + 512 * 128)}


def _subnet(c_in: int, c_out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(c_in, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, c_out))


class PlainFlow(nn.Module):
    """A flow by the op's reference, called as FrEIA's are."""

    def __init__(self, flow: CouplingFlow):
        super().__init__()
        self.flow = copy.deepcopy(flow)

    def forward(self, x: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        return reference.coupling_flow(x, self.flow.params, inverse=rev)


def _flows(kind: str, device: str) -> tuple[nn.Module, CouplingFlow, CouplingFlow]:
    """The baseline, and ours with both ways of remembering, all of the same numbers."""
    torch.manual_seed(0)
    if not FREIA:
        ours = CouplingFlow(DIM, BLOCKS, HIDDEN, kind=KINDS[kind]).to(device)
        rebuilding = copy.deepcopy(ours)
        rebuilding.memory = "recompute"
        return PlainFlow(ours), ours, rebuilding
    import FrEIA.framework
    import FrEIA.modules

    inn = FrEIA.framework.SequenceINN(DIM)
    for _ in range(BLOCKS):
        inn.append(getattr(FrEIA.modules, kind), subnet_constructor=_subnet)
    inn = inn.to(device)
    return inn, convert(inn), convert(inn, memory="recompute")


def _step(flow: nn.Module, x: Tensor) -> Callable[[], None]:
    """Negative log-likelihood under N(0, I) and its gradients; the gradients are dropped, as after an optimizer's step."""

    def step() -> None:
        z, logdet = flow(x)
        (0.5 * z.square().sum(1) - logdet).mean().backward()
        for parameter in flow.parameters():
            parameter.grad = None

    return step


def _quiet(function: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            function()

    return run


def _weights_bytes(kind: str) -> int:
    return 4 * MACS[kind]


def cases(device: str) -> list[Case]:
    out = []
    floors = {("forward", 1): 5.0, ("inverse", 1): 5.0, ("forward", 64): 3.0, ("inverse", 64): 3.0}
    training = {("AllInOneBlock", "save"): 1.8, ("AllInOneBlock", "recompute"): 1.4, ("GLOWCouplingBlock", "save"): 1.8}
    for kind in MACS:
        inn, saving, rebuilding = _flows(kind, device)
        for batch in (1, 64, 512):
            x = torch.randn(batch, DIM, device=device)

            def check(kind=kind, inn=inn, flow=saving, x=x) -> None:
                # The house rule, against the baseline in fp64: ten GLOW blocks with fresh weights blow values up to 1e4 and
                # more, where two right fp32 results differ by far more than 1e-5.
                with torch.no_grad():
                    truth = copy.deepcopy(inn).double()(x.double())
                    for ours, theirs, exact in zip(flow(x), inn(x), truth, strict=True):
                        allowed = 2 * (theirs - exact).abs().max() + torch.finfo(x.dtype).eps * exact.abs().max()
                        error = (ours - exact).abs().max()
                        assert error <= allowed, (
                            f"{kind}: error {error:.2e} against {BASELINE} in fp64, allowed {allowed:.2e}"
                        )

            flops = 2 * MACS[kind] * batch
            for way in ("forward", "inverse"):
                ours = saving if way == "forward" else saving.inverse
                out.append(
                    Case(
                        name=f"{kind} {way}, batch {batch}",
                        ours=_quiet(lambda f=ours, x=x: f(x)),
                        baseline=_quiet(lambda inn=inn, x=x, rev=way == "inverse": inn(x, rev=rev)),
                        baseline_name=BASELINE,
                        floor=floors.get((way, batch)) if FREIA and kind == "AllInOneBlock" else None,
                        bytes=_weights_bytes(kind),
                        flops=flops,
                        check=check,
                    )
                )
            for memory, flow in (("save", saving), ("recompute", rebuilding)):
                out.append(
                    Case(
                        name=f"{kind} training step, batch {batch}, memory={memory!r}",
                        ours=_step(flow, x),
                        baseline=_step(inn, x),
                        baseline_name=BASELINE,
                        floor=training.get((kind, memory)) if FREIA and batch == 512 else None,
                        bytes=3 * _weights_bytes(kind),
                        flops=flops * (3 if memory == "save" else 4),
                        check=check,
                    )
                )
    return out
