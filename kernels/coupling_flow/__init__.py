"""The whole invertible network (affine couplings, permutations, actnorm) in one call: y and its log-determinant."""

from .op import coupling_flow
from .spec import Coupling, FlowParams, FlowSpec, Stage, Subnet, hard_permutation, soft_permutation

__all__ = [
    "Coupling",
    "FlowParams",
    "FlowSpec",
    "Stage",
    "Subnet",
    "coupling_flow",
    "hard_permutation",
    "soft_permutation",
]
