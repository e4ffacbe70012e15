"""Figures of generated texts: against references, among themselves, as a distribution, as dialogues."""

from lmvae_fast.probes.text.distributions import frechet_distance, mauve, mauve_from_histograms
from lmvae_fast.probes.text.diversity import distinct_n, self_bleu
from lmvae_fast.probes.text.embedding_match import bert_score, mover_score
from lmvae_fast.probes.text.follow_ups import fed, read_follow_ups
from lmvae_fast.probes.text.overlap import nltk_bleu, nmt_bleu, reference_overlap, rouge_lsum

__all__ = [
    "bert_score",
    "distinct_n",
    "fed",
    "frechet_distance",
    "mauve",
    "mauve_from_histograms",
    "mover_score",
    "nltk_bleu",
    "nmt_bleu",
    "read_follow_ups",
    "reference_overlap",
    "rouge_lsum",
    "self_bleu",
]
