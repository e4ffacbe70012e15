"""Arguments of LangVAE's classes, by name and default: of the real ones in their own environment, or of ours after `install()`.

usage: python signatures.py OUTPUT.json [--ours]

Standard library only beside them: it also runs where nothing of this package is.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import sys

CALLABLES = {
    "langvae": ("LangVAE.__init__", "LangVAE.forward", "LangVAE.loss_function", "LangVAE.encode_z", "LangVAE.decode_sentences",
                "LangVAE.save", "LangVAE.load_from_folder", "LangVAE.load_from_hf_hub", "LangVAE.push_to_hf_hub"),
    "langvae.encoders": ("SentenceEncoder.__init__", "SentenceEncoder.forward", "SentenceEncoder.recode", "SentenceEncoder.to"),
    "langvae.decoders": ("SentenceDecoder.__init__", "SentenceDecoder.forward", "SentenceDecoder.to"),
    "langvae.data_conversion.tokenization": ("TokenizedDataSet.__init__",
                                             "TokenizedAnnotatedDataSet.__init__", "collate_sparse_fn"),
    "langvae.pipelines": ("LanguageTrainingPipeline.__init__", "LanguageTrainingPipeline.__call__"),
}  # fmt: skip
DATACLASSES = {"langvae.trainers": "CyclicalScheduleKLThresholdTrainerConfig", "pythae.models.vae": "VAEConfig"}


def found() -> dict[str, list[list[str]]]:
    """Name -> its arguments: name, default as text, kind. Fields of dataclasses likewise."""
    out = {}
    for module, names in CALLABLES.items():
        for name in names:
            value = importlib.import_module(module)
            for part in name.split("."):
                value = getattr(value, part)
            given = [p for p in inspect.signature(value).parameters.values() if p.name != "self"]
            out[name] = [[p.name, "" if p.default is p.empty else repr(p.default), p.kind.name] for p in given]
    for module, name in DATACLASSES.items():
        fields = dataclasses.fields(getattr(importlib.import_module(module), name))
        out[name] = [[f.name, repr(f.default), "FIELD"] for f in fields if f.init]
    return out


if __name__ == "__main__":
    if "--ours" in sys.argv:
        importlib.import_module("lmvae_fast.integrations.langvae").install()
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(found(), file)
