"""Verdicts: tolerances, presets, reasons, and the status that follows from them."""
