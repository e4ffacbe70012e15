"""A Hugging Face decoder that reads a memory: attention, cache, and its weights prepared for decoding on a CPU."""
