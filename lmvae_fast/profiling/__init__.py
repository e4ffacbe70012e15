"""Time, bytes and FLOPs of steps, measured or counted without running, beside the machine's limits."""
