"""Apple's AIMv2 vision encoder in plain torch: config, layers, model, checkpoint layouts, load(), preprocess().

Notable:
- parameter names are those of Apple's own checkpoints (`preprocessor.`, `trunk.`, `head.`; query, key and value fused);
- attention is `scaled_dot_product_attention`, and no operator is rewritten for the NPU;
- RMSNorm computes in float32 for half-precision tokens and in float64 in a float64 model, so `model.double()` is a true oracle.

Source of the architecture: Fini et al., "Multimodal Autoregressive Pre-training of Large Vision Encoders", arXiv 2411.14402.
Shapes: B batch, N tokens, D width, H heads, h and w the picture's height and width in patches.
"""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------------------- config


@dataclass(frozen=True, kw_only=True)
class AIMv2Config:
    """The sizes of one AIMv2 vision encoder."""

    width: int  # D, size of a token
    depth: int  # number of blocks
    heads: int  # H; every released variant has D / H = 128
    hidden: int  # size inside the feed-forward layer
    image_size: int | None  # side of the square picture in pixels; None: native resolution, sin-cos positions
    pool: bool = False  # attention-pool head (the image tower of lit)
    patch: int = 14  # side of a patch in pixels
    channels: int = 3
    eps: float = 1e-5  # added to the mean square in every norm

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.image_size is None and self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4, which sin-cos positions need")

    @property
    def tokens(self) -> int | None:
        """N for the square picture, None at native resolution."""
        return None if self.image_size is None else (self.image_size // self.patch) ** 2


_SIZES = {  # name: width, depth, heads, hidden
    "large": (1024, 24, 8, 2816),
    "huge": (1536, 24, 12, 4096),
    "1B": (2048, 24, 16, 5632),
    "3B": (3072, 24, 24, 8192),
}


def _variant(size: str, image_size: int | None, pool: bool = False) -> AIMv2Config:
    width, depth, heads, hidden = _SIZES[size]
    return AIMv2Config(width=width, depth=depth, heads=heads, hidden=hidden, image_size=image_size, pool=pool)


VARIANTS: dict[str, AIMv2Config] = {
    **{f"aimv2-{size}-patch14-{side}": _variant(size, side) for size, side in product(_SIZES, (224, 336, 448))},
    **{f"aimv2-large-patch14-{side}-distilled": _variant("large", side) for side in (224, 336)},
    "aimv2-large-patch14-native": _variant("large", None),
    "aimv2-large-patch14-224-lit": _variant("large", 224, pool=True),
}

# ---------------------------------------------------------------------------------------------------------- layers


class RMSNorm(nn.Module):
    """z / sqrt(mean(z²) + eps) * weight over the last axis, rounded to the tokens' dtype once, at the end.

    `rms_norm` works in float32 for half-precision tokens and in float64 for float64 ones.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.rms_norm(tokens, self.weight.shape, self.weight, self.eps)


class Patchifier(nn.Module):
    """Cuts the picture into patches, one token each, in rows from the top left."""

    def __init__(self, config: AIMv2Config):
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.width, kernel_size=config.patch, stride=config.patch)
        self.norm = RMSNorm(config.width, config.eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.proj(pixel_values)  # (B, D, h, w)
        return self.norm(patches.flatten(2).transpose(1, 2))  # (B, N, D)


class Preprocessor(nn.Module):
    """Pixels to tokens: patches, then the position added after the norm."""

    def __init__(self, config: AIMv2Config):
        super().__init__()
        self.config = config
        self.patchifier = Patchifier(config)
        if config.tokens is not None:
            self.pos_embed = nn.Parameter(torch.empty(1, config.tokens, config.width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        height, width = self._check(pixel_values)
        tokens = self.patchifier(pixel_values)  # (B, N, D)
        if self.config.tokens is not None:
            return tokens + self.pos_embed
        return tokens + sincos_positions(height, width, self.config.width).to(tokens)

    def _check(self, pixel_values: Tensor) -> tuple[int, int]:
        """The picture's height and width in patches. Raises: ValueError when the model cannot take the picture."""
        side, channels, patch = self.config.image_size, self.config.channels, self.config.patch
        wanted = f"(B, {channels}, {side or 'H'}, {side or 'W'})"
        if pixel_values.dim() != 4 or pixel_values.shape[1] != channels:
            raise ValueError(f"pixel_values have shape {tuple(pixel_values.shape)}, this model takes {wanted}")
        height, width = pixel_values.shape[2:]
        if side is not None and (height, width) != (side, side):
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}, this model takes {wanted}: its positions are"
                " learned for that size; resize the picture or take the native variant"
            )
        if height < patch or width < patch:
            raise ValueError(f"a picture of {height} x {width} pixels holds no patch of {patch} x {patch}")
        return height // patch, width // patch


def sincos_positions(height: int, width: int, dim: int) -> Tensor:
    """Position embedding of a height x width grid of patches, (1, height * width, dim) in float64 on the CPU.

    The quarters of `dim` hold sin and cos of the column, then sin and cos of the row, each at dim / 4 frequencies
    10000^(-j / (dim / 4)): column before row, as the released weights were trained.
    """
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    rows = torch.arange(height, dtype=torch.float64, device="cpu").repeat_interleave(width)  # (N,)
    columns = torch.arange(width, dtype=torch.float64, device="cpu").repeat(height)  # (N,)
    angles = [position[:, None] * omega for position in (columns, rows)]  # 2 x (N, dim / 4)
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)[None]


class Attention(nn.Module):
    """Multi-head self-attention without mask; rows of `qkv` are query, key, value, each of them heads first."""

    def __init__(self, config: AIMv2Config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        B, N, D = tokens.shape
        qkv = self.qkv(tokens).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # (B, H, N, D / H)
        mixed = F.scaled_dot_product_attention(query, key, value)  # scale (D / H)^-0.5
        return self.proj(mixed.transpose(1, 2).reshape(B, N, D))


class SwiGLU(nn.Module):
    """fc2(silu(fc1 x) * fc3 x): fc1 is the gate, fc3 goes up, fc2 comes down."""

    def __init__(self, config: AIMv2Config):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.hidden, bias=False)
        self.fc2 = nn.Linear(config.hidden, config.width, bias=False)
        self.fc3 = nn.Linear(config.width, config.hidden, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(tokens)) * self.fc3(tokens))


class Block(nn.Module):
    def __init__(self, config: AIMv2Config):
        super().__init__()
        self.norm_1 = RMSNorm(config.width, config.eps)
        self.attn = Attention(config)
        self.norm_2 = RMSNorm(config.width, config.eps)
        self.mlp = SwiGLU(config)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm_1(tokens))
        return tokens + self.mlp(self.norm_2(tokens))


class Trunk(nn.Module):
    def __init__(self, config: AIMv2Config):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.post_trunk_norm = RMSNorm(config.width, config.eps)

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        return self.post_trunk_norm(tokens)


class AttentionPool(nn.Module):
    """One learned query looks at all tokens; the query has no projection of its own."""

    def __init__(self, config: AIMv2Config):
        super().__init__()
        self.heads = config.heads
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.k = nn.Linear(config.width, config.width, bias=False)
        self.v = nn.Linear(config.width, config.width, bias=False)
        self.linear = nn.Linear(config.width, config.width)

    def forward(self, features: Tensor) -> Tensor:
        B, N, D = features.shape
        split = lambda tokens: tokens.view(B, -1, self.heads, D // self.heads).transpose(1, 2)  # noqa: E731
        query = split(self.cls_token.expand(B, -1, -1))  # (B, H, 1, D / H)
        mixed = F.scaled_dot_product_attention(query, split(self.k(features)), split(self.v(features)))
        return self.linear(mixed.reshape(B, D))


# ----------------------------------------------------------------------------------------------------------- model


class AIMv2(nn.Module):
    """The vision encoder: `model(pixel_values)` gives features, `model.pool(features)` one vector a picture."""

    def __init__(self, config: AIMv2Config):
        super().__init__()
        self.config = config
        self.preprocessor = Preprocessor(config)
        self.trunk = Trunk(config)
        if config.pool:
            self.head = AttentionPool(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features of every patch after the last norm: (B, 3, H, W) -> (B, N, D).

        Raises: ValueError for a picture of a size that the variant has no positions for.
        """
        return self.trunk(self.preprocessor(pixel_values))

    def pool(self, features: Tensor) -> Tensor:
        """Attention-pooled features: (B, N, D) -> (B, D). Raises: ValueError when the variant has no such head."""
        if not self.config.pool:
            raise ValueError("this AIMv2 has no attention-pool head; of the released variants only lit's image tower has")
        return self.head(features)


def build(name: str | AIMv2Config, seed: int = 0) -> AIMv2:
    """An AIMv2 in float32 with seeded weights, under which a mapping mistake shows.

    Norms are 1 + 0.3 N(0, 1), matrices N(0, 1) / sqrt(fan-in), positions 0.5 N(0, 1), biases and the pool's query
    N(0, 1): with norms of one and matrices of std 0.02 many swapped tensors would go unseen. Every tensor has a
    random stream of its own, made from `seed` and its name, so the weights depend on nothing else.

    Raises: ValueError for a name that is not in VARIANTS.
    """
    if isinstance(name, str) and name not in VARIANTS:
        raise ValueError(f"no AIMv2 is called {name!r}; there are {', '.join(sorted(VARIANTS))}")
    with torch.device("meta"):
        model = AIMv2(VARIANTS[name] if isinstance(name, str) else name)
    model.to_empty(device="cpu").requires_grad_(False).eval()
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:  # filling releases the interpreter lock
        list(pool.map(lambda item: _fill(*item, seed), model.named_parameters()))
    return model


def _fill(name: str, parameter: Tensor, seed: int) -> None:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    if "norm" in name:
        parameter.normal_(1.0, 0.3, generator=generator)
    elif name.endswith("pos_embed"):
        parameter.normal_(0.0, 0.5, generator=generator)
    elif name.endswith((".bias", "cls_token")):
        parameter.normal_(0.0, 1.0, generator=generator)
    else:
        fan_in = math.prod(parameter.shape[1:])
        parameter.normal_(0.0, fan_in**-0.5, generator=generator)

# --------------------------------------------------------------------------------------------------------- picture

# ----------------------------------------------------------------------------------------------------- checkpoints
