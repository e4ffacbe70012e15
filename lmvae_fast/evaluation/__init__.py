"""What a model is worth: likelihoods, use of the latent space, reconstruction."""

from lmvae_fast.evaluation.evaluate import METRICS, EvaluationResult, evaluate
from lmvae_fast.evaluation.metrics import (
    active_units,
    dimension_wise_kl,
    gaussian_log_density,
    importance_weighted_log_likelihood,
    kl_divergence,
    mutual_information,
    perplexity,
    total_correlation,
)
from lmvae_fast.evaluation.text import bleu, exact_match, token_accuracy
from lmvae_fast.evaluation.within_prompts import within_prompts

__all__ = [
    "METRICS",
    "EvaluationResult",
    "active_units",
    "bleu",
    "dimension_wise_kl",
    "evaluate",
    "exact_match",
    "gaussian_log_density",
    "importance_weighted_log_likelihood",
    "kl_divergence",
    "mutual_information",
    "perplexity",
    "token_accuracy",
    "total_correlation",
    "within_prompts",
]
