"""Decoding speed against LangVAE, against transformers.generate, and against our own eager reference."""
