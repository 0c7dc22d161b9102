"""What the device is compared with: the same weights and inputs on the CPU in the same dtype, in float64, and as a
forecast.

Weights are built once and copied; the CPU's runs are repeatable for a given number of threads.
"""

from harness.reference.autocast import watching_autocast
from harness.reference.extremes import as_golden_has, as_infinite
from harness.reference.float32 import require_float32
from harness.reference.models import Models, copy_module
from harness.reference.raised import is_of_a_model, location_of
from harness.reference.randomness import Drawn, Draws, drawing, seeded
from harness.reference.runs import Float64Products, Reference, moved_by_one_rounding, refer, roundoff, run, run_cpu
from harness.reference.tensors import content_digest, digest, fresh, inputs_digest, move, tensors_of, weights_digest
from harness.reference.untouched import changes, untouched, version
from harness.reference.wide import WideRequests
from harness.reference.written import BUFFER, INPUT, named_tensors, watching

__all__ = [
    "BUFFER",
    "INPUT",
    "Drawn",
    "Draws",
    "Float64Products",
    "Models",
    "Reference",
    "WideRequests",
    "as_golden_has",
    "as_infinite",
    "changes",
    "content_digest",
    "copy_module",
    "digest",
    "drawing",
    "fresh",
    "inputs_digest",
    "is_of_a_model",
    "location_of",
    "move",
    "moved_by_one_rounding",
    "named_tensors",
    "refer",
    "require_float32",
    "roundoff",
    "run",
    "run_cpu",
    "seeded",
    "tensors_of",
    "untouched",
    "version",
    "watching",
    "watching_autocast",
    "weights_digest",
]
