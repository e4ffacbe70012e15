"""Where a step's time, bytes and FLOPs go, and what the machine could do: measured, or counted without running."""
