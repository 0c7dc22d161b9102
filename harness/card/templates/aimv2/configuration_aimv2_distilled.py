"""The sizes of an AIMv2 vision encoder, as the shapes of its weights and its config.json tell them."""

import json
import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class AIMv2Config:
    """Sizes in the names of transformers' config. `image_size` None: any size, with positions by sine and cosine."""

    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 24
    num_attention_heads: int = 8
    num_channels: int = 3
    patch_size: int = 14
    image_size: int | None = 224
    rms_norm_eps: float = 1e-5
    use_head: bool = False

    @classmethod
    def of(cls, folder, tensors):
        """The config of a checkpoint. `tensors`: its weights under this model's names, as `convert_weights` gives them.

        The number of heads and the epsilon are in no weight: they come from config.json, else from the released models
        (heads of 128 numbers, 1e-5).
        """
        path = Path(folder) / "config.json"
        fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        fields = fields.get("vision_config") or fields
        width, channels, patch, _ = tensors["preprocessor.patchifier.proj.weight"].shape
        heads = fields.get("num_attention_heads") or (fields.get("model_args") or {}).get("num_heads") or width // 128
        positions = tensors.get("preprocessor.pos_embed")
        side = None if positions is None else math.isqrt(positions.shape[1]) * patch
        return cls(
            hidden_size=width,
            intermediate_size=tensors["trunk.blocks.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("trunk.blocks.")),
            num_attention_heads=heads,
            num_channels=channels,
            patch_size=patch,
            image_size=side,
            rms_norm_eps=fields.get("rms_norm_eps", 1e-5),
            use_head="head.cls_token" in tensors,
        )
