"""Versions of other packages outside those that an integration was tested with: one warning, and no more."""

from __future__ import annotations

import importlib
import warnings

import pytest
from torch import nn

from lmvae_fast.errors import ConfigError
from lmvae_fast.integrations import freia, normalizing_flows, versions


@pytest.fixture
def other_versions(monkeypatch):
    """Every package has version 9.1.0rc2."""
    monkeypatch.setattr(versions, "_warned", set())
    monkeypatch.setattr(versions, "version", lambda package: "9.1.0rc2")


def test_other_versions_warn_once(other_versions):
    with pytest.warns(UserWarning, match=r"thing 9\.1\.0rc2 is outside .*>= 6\.0, < 7"):
        versions.warn_outside("thing", "6.0", "7")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_outside("thing", "6.0", "7")
        versions.warn_outside("other", "9", "10")
    assert versions.numbers("6.2.0rc1") == (6, 2)


@pytest.mark.parametrize(
    ("module", "package", "needs"),
    [
        ("hub", "transformers", "transformers"),
        ("sentence_transformers", "sentence-transformers", "sentence_transformers"),
        ("pythae", "pythae", "pythae.models.base.base_model"),
    ],
)
def test_modules_warn_when_they_are_imported(other_versions, module, package, needs):
    pytest.importorskip(needs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may be the first import of all
        loaded = importlib.import_module(f"lmvae_fast.integrations.{module}")
    versions._warned.clear()
    before = dict(vars(loaded))
    try:
        with pytest.warns(UserWarning, match=rf"^{package} 9\.1\.0rc2 is outside"):
            importlib.reload(loaded)
    finally:
        vars(loaded).update(before)


@pytest.mark.parametrize(
    ("convert", "package"),
    [(normalizing_flows.from_normflows, "normflows"), (normalizing_flows.from_nflows, "nflows")],
)
def test_converters_warn_and_name_what_is_no_flow(other_versions, convert, package):
    with pytest.warns(UserWarning, match=rf"^{package} 9\.1\.0rc2"), pytest.raises(ConfigError):
        convert(nn.Linear(2, 2))


def test_freias_sequences_warn_and_ours_do_not(other_versions):
    framework, modules = pytest.importorskip("FrEIA.framework"), pytest.importorskip("FrEIA.modules")

    def build(of_framework, of_modules):
        inn = of_framework.SequenceINN(4)
        inn.append(of_modules.AllInOneBlock, subnet_constructor=lambda a, b: nn.Sequential(nn.Linear(a, b)))
        return inn

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        freia.convert(build(importlib.import_module("lmvae_fast.integrations.freia.framework"), freia))
    with pytest.warns(UserWarning, match=r"^FrEIA 9\.1\.0rc2"):
        freia.convert(build(framework, modules))
    start = framework.InputNode(4, name="input")
    graph = framework.GraphINN([start, framework.OutputNode(start, name="output")])
    for other in (graph, nn.Linear(2, 2)):
        with pytest.raises(ConfigError, match="takes a SequenceINN"):
            freia.convert(other)
