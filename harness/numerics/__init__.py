"""How Ascend NPUs round, by family: the rules that the emulator computes by, and that an error forecast can be made
from.

Pure torch, on CPU tensors. Each rule names its source and how far it can be trusted: *stated* by the vendor's documents
or sources, *fitted* to published measurements, or *assumed*. The order of an NPU's sums is not public, so these
functions give errors of the right size, not an NPU's bits.
"""

from harness.numerics.cube import (
    GROUPS,
    LONG_PIECE,
    NoFloat64,
    NotOnCube,
    convolution,
    convolution_backward,
    cuts_in_pieces,
    matmul,
    matmul_by_groups,
    scaled_product,
)
from harness.numerics.cuda import group_norm_of_half, running_sum_in_half, split_attention, split_product
from harness.numerics.families import Family, NoFloat32, cube_type, family_of
from harness.numerics.fused import LEAST, SCORES, attention, attention_backward
from harness.numerics.otherwise import ARITHMETIC, FUNCTIONS, Vector, VectorUnit
from harness.numerics.random_rounding import RandomRoundings, move_at_random, open_dimension
from harness.numerics.rounding import (
    FLOAT32,
    HALF,
    OPERANDS,
    Operands,
    round_half_away,
    round_hf32,
    round_tf32,
    saturated,
)
from harness.numerics.vector import (
    BatchMoments,
    batch_moments,
    batch_norm,
    dot,
    effective_bits,
    gelu,
    layer_norm,
    rms_norm,
    rsqrt,
    running_product,
    running_sum,
    silu,
    variance,
    wide,
)

__all__ = [
    "ARITHMETIC",
    "FLOAT32",
    "FUNCTIONS",
    "GROUPS",
    "HALF",
    "LEAST",
    "LONG_PIECE",
    "OPERANDS",
    "SCORES",
    "BatchMoments",
    "Family",
    "NoFloat32",
    "NoFloat64",
    "NotOnCube",
    "Operands",
    "RandomRoundings",
    "Vector",
    "VectorUnit",
    "attention",
    "attention_backward",
    "batch_moments",
    "batch_norm",
    "convolution",
    "convolution_backward",
    "cube_type",
    "cuts_in_pieces",
    "dot",
    "effective_bits",
    "family_of",
    "gelu",
    "group_norm_of_half",
    "layer_norm",
    "matmul",
    "matmul_by_groups",
    "move_at_random",
    "open_dimension",
    "rms_norm",
    "round_half_away",
    "round_hf32",
    "round_tf32",
    "rsqrt",
    "running_product",
    "running_sum",
    "running_sum_in_half",
    "saturated",
    "scaled_product",
    "silu",
    "split_attention",
    "split_product",
    "variance",
    "wide",
]
