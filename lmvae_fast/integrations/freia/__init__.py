"""FrEIA 0.2: its sequences converted to our flow, and its blocks by their own names, running on coupling_flow.

FrEIA's ``framework`` and ``modules`` are modules here too: a script changes its two import lines.
"""

from lmvae_fast.integrations.freia.blocks import (
    ActNorm,
    AllInOneBlock,
    GLOWCouplingBlock,
    PermuteRandom,
    RNVPCouplingBlock,
)
from lmvae_fast.integrations.freia.conversion import convert
from lmvae_fast.integrations.freia.framework import SequenceINN

__all__ = [
    "ActNorm",
    "AllInOneBlock",
    "GLOWCouplingBlock",
    "PermuteRandom",
    "RNVPCouplingBlock",
    "SequenceINN",
    "convert",
]
