"""What models learn, rather than how fast: runs whose figures are recorded."""
