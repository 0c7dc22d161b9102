"""Checkpoint layouts as rules, and conversion between them."""
