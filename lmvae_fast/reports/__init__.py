"""HTML pages: what the demonstration, the profiles and the probes show."""
