"""Comparing and scoring pictures."""
