"""What each integration gains: its framework's own example without this package and with it, in turn, in one run."""
