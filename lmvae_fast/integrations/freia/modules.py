"""FrEIA's blocks under the name of its own module: ``import lmvae_fast.integrations.freia.modules as Fm``."""

from lmvae_fast.integrations.freia.blocks import (
    ActNorm,
    AllInOneBlock,
    GLOWCouplingBlock,
    PermuteRandom,
    RNVPCouplingBlock,
)

__all__ = ["ActNorm", "AllInOneBlock", "GLOWCouplingBlock", "PermuteRandom", "RNVPCouplingBlock"]
