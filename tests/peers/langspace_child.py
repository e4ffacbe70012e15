"""Runs in an environment with LangSpace 0.3.7 and without LangVAE: its probes on our objects, unmodified.

usage: python langspace_child.py PARTS OUTPUT.json

Word vectors and stop words, which LangSpace downloads, are small ones made here.
"""

from __future__ import annotations

import json
import sys
import traceback

import numpy as np
import torch

from lmvae_fast.integrations.langvae import LangVAE, install

install()

import gensim.downloader  # noqa: E402
import nltk  # noqa: E402
from gensim.models.keyedvectors import KeyedVectors  # noqa: E402
from langspace.metrics.disentanglement import DisentanglementMetric  # noqa: E402
from langspace.metrics.interpolation import InterpolationMetric  # noqa: E402
from langspace.ops.arithmetic import ArithmeticOps  # noqa: E402
from langspace.probe import (  # noqa: E402
    ArithmeticProbe,
    DisentanglementProbe,
    InterpolationProbe,
    TraversalProbe,
)
from saf import Sentence, Token  # noqa: E402

folder, output = sys.argv[1:]
torch.manual_seed(0)
np.random.seed(0)


def sentence(text: str) -> Sentence:
    made = Sentence()
    made.surface = text
    made.tokens = []
    for i, word in enumerate(text.split()):
        token = Token()
        token.surface = word
        token.annotations = {"srl": "ARG0" if i == 1 else "V" if i == 2 else "O"}
        made.tokens.append(token)
    return made


class Vectors(KeyedVectors):
    """Any word has a vector."""

    def wmdistance(self, one: list[str], two: list[str]) -> float:
        return abs(len(one) - len(two)) + 0.5


gensim.downloader.load = lambda name: Vectors(2)
nltk.download = lambda name: True
nltk.corpus.stopwords.words = lambda language: ["the", "a"]
import langspace.probe.interpolation as interpolation  # noqa: E402

interpolation.download = nltk.download
interpolation.stopwords = nltk.corpus.stopwords

model = LangVAE.load_from_folder(folder)
texts = ["a cat sleeps", "the sun shines", "ice melts slowly", "plants need light", "a stone falls", "water is liquid"]
data = [sentence(text) for text in texts * 4]
pairs = list(zip(data[:3], data[3:6], strict=True))
results: dict[str, object] = {}


def probe(name, run) -> None:
    try:
        results[name] = run()
    except Exception:
        results[name] = {"error": traceback.format_exc()[-1500:]}


def interpolate():
    frame = InterpolationProbe(model, pairs, [InterpolationMetric.SMOOTHNESS]).report()
    return {"rows": len(frame), "columns": list(frame.columns), "steps": len(frame["generate"][0].split("\n"))}


def traverse():
    frame = TraversalProbe(model, data[:2], sample_size=3, dims=[0, 1]).report()
    return {"rows": len(frame), "columns": list(frame.columns)}


def arithmetic():
    frame = ArithmeticProbe(model, pairs, ops=[ArithmeticOps.SUM, ArithmeticOps.SUB, ArithmeticOps.AVG]).report()
    return {"rows": len(frame), "columns": list(frame.columns)}


def disentanglement(metric):
    def run():
        factors = {"agent": ["ARG0"], "action": ["V"]}
        kinds = {"srl": ["O", "ARG0", "V"]}
        labelled = LangVAE(model.model_config, *fresh_parts())
        frame = DisentanglementProbe(
            labelled, data, sample_size=24, metrics=[metric], gen_factors=factors, annotations=kinds, batch_size=8
        ).report()
        return {"rows": len(frame), "columns": list(frame.columns)}

    return run


def fresh_parts():
    from lmvae_fast.integrations.langvae import SentenceDecoder, SentenceEncoder

    decoder = SentenceDecoder(model.decoder.model_path, model.latent_dim, model.decoder.max_len)
    return SentenceEncoder(model.encoder.model_path, model.latent_dim, decoder.tokenizer), decoder


probe("interpolation", interpolate)
probe("traversal", traverse)
probe("arithmetic", arithmetic)
for metric in DisentanglementMetric:
    probe(f"disentanglement {metric.name}", disentanglement(metric))
with open(output, "w", encoding="utf-8") as file:
    json.dump(results, file, indent=1, default=str)
