"""Runs whose quality is recorded, not their speed."""
