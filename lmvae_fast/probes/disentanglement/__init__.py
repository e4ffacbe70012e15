"""Disentanglement: which dimension of a latent tells which generative factor, by eight published metrics."""

from lmvae_fast.probes.disentanglement.groups import group_accuracy, majority_vote_accuracy, z_diff, z_min_var
from lmvae_fast.probes.disentanglement.importance import DCI, dci, dci_from_importance
from lmvae_fast.probes.disentanglement.information import mig, modularity, mutual_information
from lmvae_fast.probes.disentanglement.predictability import SAP_VARIANTS, explicitness, sap

__all__ = [
    "DCI",
    "SAP_VARIANTS",
    "dci",
    "dci_from_importance",
    "explicitness",
    "group_accuracy",
    "majority_vote_accuracy",
    "mig",
    "modularity",
    "mutual_information",
    "sap",
    "z_diff",
    "z_min_var",
]
