"""From sentences to token ids, packed batches and back."""
