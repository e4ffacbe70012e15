"""Parts that several benchmarks share: cases, processes of their own, timing in turn, records, and LangVAE's environment."""
