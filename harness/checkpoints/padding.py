"""Outputs at positions of padding, which no model defines: they are set to zero on all sides.

Where a mask hides every key from a query, attention has nothing to average: torch's CPU kernels return zeros, the
kernel of Ascend NPUs the mean of all values unless `inner_precise` is 2, cuDNN something else again. Such queries are
the padding before a short text, and padding behind one in a model with a sliding window. What a model returns there is
read by nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

NOTE = "outputs at positions of padding are set to zero on both sides: no model defines them"
_FLAT = ("start_logits", "end_logits")  # a number for each token
_OTHERS = ("vision", "image", "pixel", "audio")  # what begins so is not of the tokens


def tokens_alone(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """What `model(**inputs)` returns, zero at the positions of padding: see `without_padding`."""
    return without_padding(model(**inputs), inputs)


def without_padding(outputs: Any, inputs: Mapping[str, Any]) -> Any:
    """Outputs with one row for each token, zero where the mask of `inputs` is 0; all others as they are.

    `attention_mask` (B, T) is that of the encoder where there are `decoder_input_ids`, and `decoder_attention_mask`
    that of what the decoder returns. An output of tokens is (B, T, D), or (B, T) if it is `start_logits` or
    `end_logits`.

        without_padding({"logits": torch.ones(1, 2, 3)}, {"attention_mask": torch.tensor([[0, 1]])})
        # {"logits": zeros for the first token, ones for the second}
    """
    mask = inputs.get("attention_mask")
    if "decoder_input_ids" not in inputs:
        return _blanked(outputs, "", mask, mask)
    return _blanked(outputs, "", inputs.get("decoder_attention_mask"), mask)


def _blanked(value: Any, name: str, mask: Any, encoder_mask: Any) -> Any:
    if isinstance(value, Mapping):
        result = {key: _blanked(item, key, mask, encoder_mask) for key, item in value.items() if item is not None}
        return type(value)(**result) if hasattr(value, "to_tuple") else result
    if isinstance(value, (tuple, list)):
        return type(value)(_blanked(item, name, mask, encoder_mask) for item in value)
    mask = encoder_mask if name.startswith("encoder") else mask
    if not isinstance(value, Tensor) or not isinstance(mask, Tensor) or name.startswith(_OTHERS):
        return value
    hidden = mask == 0
    if value.shape[:-1] == mask.shape:
        return value.masked_fill(hidden.unsqueeze(-1), 0)
    return value.masked_fill(hidden, 0) if name in _FLAT and value.shape == mask.shape else value
