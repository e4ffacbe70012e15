"""Generation: from latents to text, in batches over a static cache."""
