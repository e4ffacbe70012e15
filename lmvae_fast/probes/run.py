"""All probes of one model on one set of sentences: ``lmvae_fast.probe``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lmvae_fast.data.dataset import SentenceDataset
from lmvae_fast.documents import parse_json, read_text
from lmvae_fast.errors import ConfigError, DataError, LMVAEError
from lmvae_fast.models.modes import evaluating
from lmvae_fast.probes import checks, of_latents, of_tasks, of_texts
from lmvae_fast.probes.encodings import encode, encoding_fingerprint, texts_fingerprint
from lmvae_fast.probes.factors import FactorTable
from lmvae_fast.probes.results import plain
from lmvae_fast.probes.sections import Context, Section, Settings

#: Every probe of a model, in the order of the report.
PROBES: dict[str, Callable[[Context], Section]] = {
    "overview": of_latents.overview,
    "disentanglement": of_latents.disentanglement,
    "clusters": of_latents.cluster_separation,
    "maps": of_latents.maps,
    "neighbourhoods": of_latents.neighbourhoods,
    "reconstruction": of_texts.reconstruction,
    "generation": of_texts.generation,
    "interpolation": of_texts.interpolation,
    "traversal": of_texts.traversal,
    "sts": of_tasks.sts,
    "linguistic": of_tasks.linguistic,
}


@dataclass(frozen=True)
class ProbeReport:
    """What the probes found.

    Attributes:
        model: name or folder of the model.
        data: ``source``, ``sentences``, ``fingerprint`` of the sentences.
        settings: every choice that was made for all probes.
        sections: by probe: figures (``report["disentanglement"]["mig"]``), tables, pictures, replicates.
        skipped: probe -> why it was not run.
        seconds: wall time by probe.
    """

    model: str
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    sections: Mapping[str, Section]
    skipped: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, probe: str) -> Section:
        if probe not in self.sections:
            raise KeyError(f"{probe}: {self.skipped.get(probe, 'not among the probes that were run')}")
        return self.sections[probe]

    def __contains__(self, probe: object) -> bool:
        return probe in self.sections

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; what is not finite is None."""
        return {
            "model": self.model,
            "data": plain(dict(self.data)),
            "settings": plain(dict(self.settings)),
            "sections": {name: section.to_dict() for name, section in self.sections.items()},
            "skipped": dict(self.skipped),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }


def probe(
    model: Any,
    data: Sequence[Any],
    *,
    probes: Sequence[str] | None = None,
    factors: FactorTable | None = None,
    latents: str = "means",
    sts: str | Path | None = None,
    linguistic: str | Path | None = None,
    cache: str | Path | None = None,
    name: str | None = None,
    progress: bool = False,
    **settings: Any,
) -> ProbeReport:
    """Probe a model.

    Args:
        model: an LMVAE of sentences; evaluated without gradients, its training mode is restored.
        data: sentences: a SentenceDataset (whose generative factors or role labels become the factors), or strings.
        probes: names of :data:`PROBES`; None for all. Of all, those that the data or the inputs do not allow are skipped and
            named in ``skipped``; one that was asked for by name raises instead.
        factors: a table of factors of the sentences, in place of the data's own.
        latents: ``"means"``, the posterior means, or ``"samples"``, a draw of each posterior under the seed.
        sts: CSV file of sentence pairs with scores. linguistic: folder of tasks in SentEval's format.
        cache: folder of encodings, see :func:`~lmvae_fast.probes.encodings.encode`.
        name: of the model, for the report.
        progress: draw progress bars.
        settings: fields of :class:`~lmvae_fast.probes.sections.Settings` (seed, numbers of sentences, vectors ...).

    Raises:
        ConfigError: an unknown probe or setting, a model of prompts. DataError: no sentence, factors of other rows, or a
            file that cannot be used. MissingPackageError: a probe asked for by name lacks a package.
    """
    named = list(PROBES if probes is None else probes)
    for wanted in named:
        checks.one_of("probe", wanted, PROBES)
    if not named:
        raise ConfigError("no probe was asked for", value="probes=[]", limit=", ".join(PROBES))
    checks.one_of("latents", latents, ("means", "samples"))
    chosen = _settings(settings)
    dataset = data if isinstance(data, SentenceDataset) else SentenceDataset.from_iterable(data, on_empty="error")
    if factors is not None and len(factors) != len(dataset):
        raise DataError("factors and sentences differ in number", value=len(factors), limit=len(dataset))
    started = time.perf_counter()
    sections, skipped = {}, {}
    with evaluating(model):
        with _bar("encode", len(dataset), progress) as done:
            encodings = encode(model, list(dataset), cache=cache, batch_size=chosen.batch_size, progress=done)
        context = Context(
            model=model, data=dataset, encodings=encodings, given_factors=factors, settings=chosen, sts=sts,
            linguistic=linguistic, cache=cache, bar=lambda title, total: _bar(title, total, progress),
            z=encodings.means() if latents == "means" else encodings.sample(chosen.seed),
        )  # fmt: skip
        seconds = {"encoding": time.perf_counter() - started}
        for wanted in named:
            started = time.perf_counter()
            try:
                sections[wanted] = PROBES[wanted](context)
            except LMVAEError as error:
                if probes is not None:
                    raise
                skipped[wanted] = error.problem + (f"; {error.remedy}" if error.remedy else "")
            seconds[wanted] = time.perf_counter() - started
    about = {
        "source": dataset.report.source, "sentences": len(dataset), "fingerprint": texts_fingerprint(dataset.texts),
        "tokens": encodings.report,
    }  # fmt: skip
    described = {**asdict(chosen), "latents": latents, "latent_dim": model.config.latent_dim,
                 "system": model.config.system, "encoding": encoding_fingerprint(model)}  # fmt: skip
    return ProbeReport(
        name or getattr(model.config, "name", None) or "model", about, described, sections, skipped, seconds
    )


def read_report(path: str | Path) -> dict[str, Any]:
    """What ``ProbeReport.to_dict`` wrote as JSON; raises DataError for a file that is none."""
    found = parse_json(read_text(path), f"{path} is no probe report", remedy="give the .json beside a probe page")
    if not isinstance(found, dict) or not {"model", "data", "settings", "sections"} <= found.keys():
        raise DataError(f"{path} is no probe report", limit="a JSON object with model, data, settings and sections")
    return found


def _settings(given: Mapping[str, Any]) -> Settings:
    known = tuple(Settings.__dataclass_fields__)
    for setting in given:
        checks.one_of("setting", setting, known)
    return Settings(**given)


@contextmanager
def _bar(title: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    with tqdm(total=total, desc=title, unit="", disable=not shown or math.isinf(total), leave=False) as bar:

        def advance(count: int = 1) -> None:
            bar.update(count)

        yield advance
