"""The operators: name, C signature, meaning, by kind.

Order of arguments: the EXEC_NPU_CMD lines of Ascend/op-plugin (op_plugin/ops/opapi); their C types: CANN's headers of
each operator. Products, convolutions, attention, norms and activations follow harness/numerics/; everything else is
torch's own, computed in float32 for half dtypes and rounded once.
"""

from harness.emulator.operators import (
    aclop,
    aclop_layers,
    aclop_math,
    activations,
    attention,
    boxes,
    chance,
    elementwise,
    foreach,
    linalg,
    losses,
    norms,
    optimizers,
    positions,
    products,
    recurrent,
    reductions,
    spatial,
    tensors,
)
from harness.emulator.table import OLDER, OPERATORS

__all__ = [
    "OLDER",
    "OPERATORS",
    "aclop",
    "aclop_layers",
    "aclop_math",
    "activations",
    "attention",
    "boxes",
    "chance",
    "elementwise",
    "foreach",
    "linalg",
    "losses",
    "norms",
    "optimizers",
    "positions",
    "products",
    "recurrent",
    "reductions",
    "spatial",
    "tensors",
]
