"""Probes: what a latent space holds, how it is laid out, and what is decoded from it.

The metrics are pure functions of arrays: ``disentanglement``, ``geometry``, ``clusters``, ``projections``, ``sts``,
``linguistic``, ``text``, ``definition_modelling``, ``generation_quality``; ``factors`` makes their factor tables.
"""
