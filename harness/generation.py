"""The names of `harness.measure.generation` under the module's former name."""

from harness.measure.generation import first_divergence, greedy, shared_length, until

__all__ = ["first_divergence", "greedy", "shared_length", "until"]
