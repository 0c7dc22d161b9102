"""Apple's AIMv2 vision encoder in plain torch: config, layers, model, preprocess(), load(), convert_checkpoint().

The layouts of checkpoints are declared in `aimv2_layouts.py`.

Notable:
- parameter names are those of Apple's own checkpoints (`preprocessor.`, `trunk.`, `head.`; query, key and value fused);
- attention is `scaled_dot_product_attention`, and no operator is rewritten for the NPU;
- RMSNorm computes in float32 for half-precision tokens and in float64 in a float64 model, so `model.double()` is a true
  oracle.

Source of the architecture: Fini et al., "Multimodal Autoregressive Pre-training of Large Vision Encoders", arXiv
2411.14402.
Shapes: B batch, N tokens, D width, H heads, h and w the picture's height and width in patches.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn import functional as F

from harness.checkpoints.conversion import (
    Joined,
    TensorEntry,
    appearing,
    config_beside,
    from_model,
    read_checkpoint,
    to_model,
    write_checkpoint,
    write_config,
)
from harness.errors import CheckpointError, HarnessError
from harness.models.aimv2_layouts import LAYOUTS, Layout

# -------- config


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

    @property
    def size_name(self) -> str:
        """What names of checkpoints call this width: "large", …; "d64" where no released variant has it."""
        return next((name for name, (width, *_) in _SIZES.items() if width == self.width), f"d{self.width}").lower()


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

# -------- layers


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


class _Block(nn.Module):
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
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
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


# -------- model


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
            raise ValueError(
                "this AIMv2 has no attention-pool head; of the released variants only lit's image tower has"
            )
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


# -------- picture

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PHOTO = Path(__file__).parent / "data" / "photo.jpg"  # a photograph in the public domain: data/SOURCES.md
_LARGEST = 1 << 28  # pixels of a resized picture; a strip one pixel high would fill the memory


def open_picture(path: str | Path) -> Image.Image:
    """The picture in a file that Pillow opens: upright, as its EXIF orientation says, and in RGB.

    Raises: HarnessError when there is no picture in it, or not a whole one.
    """
    try:
        with Image.open(path) as opened:
            opened.load()
            return _rgb(ImageOps.exif_transpose(opened))
    except FileNotFoundError:
        raise HarnessError(f"no picture at {path}") from None
    except UnidentifiedImageError:
        raise HarnessError(f"{path} is not a picture that Pillow knows; give a JPEG, PNG or the like") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise HarnessError(f"the picture in {path} cannot be read: {' '.join(str(error).split())}") from None


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB; alpha is dropped. More than eight bits of grey are scaled, where Pillow would saturate them."""
    if image.mode == "F" or image.mode.startswith("I"):
        grey = np.asarray(image, dtype=np.float64)
        top = grey.max(initial=0.0)
        scale = 1.0 if top <= 255 else 255.0 / 65535.0
        scale = 255.0 if image.mode == "F" and top <= 1 else scale
        image = Image.fromarray(np.clip(np.rint(grey * scale), 0, 255).astype(np.uint8))
    return image.convert("RGB")


def preprocess(image: Image.Image | str | Path, size: int | None = 224) -> Tensor:
    """A picture as the hub's recipe feeds it to AIMv2: (1, 3, H, W) in float32, RGB.

    The shorter edge becomes `size` pixels (bicubic, antialiased), the middle square is cut out, and CLIP's mean and
    deviation are taken off: to the bit what transformers' CLIPImageProcessor does with Pillow. `size` None is native
    resolution: no resize, no crop. A path is opened upright by `open_picture`; an image is taken as it is.

    Raises: HarnessError for a file without a picture or a picture too elongated to resize.
    """
    picture = _rgb(image) if isinstance(image, Image.Image) else open_picture(image)
    pixels = np.asarray(picture if size is None else _square(picture, size))
    pixels = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    pixels = (pixels - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]


def _square(picture: Image.Image, size: int) -> Image.Image:
    """The shorter edge at `size`, then the middle square; offsets are rounded down."""
    width, height = picture.size
    short, long = min(width, height), max(width, height)
    if size * (size * long // short) > _LARGEST:
        raise HarnessError(
            f"a picture of {width} x {height} pixels is too elongated to make its shorter edge {size}; crop it first"
        )
    scaled = int(size * long / short)
    picture = picture.resize((size, scaled) if width <= height else (scaled, size), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


# -------- checkpoints


def layout_of(keys: Iterable[str]) -> str:
    """The layout of a checkpoint, by its keys alone: a name in `LAYOUTS`, such as "apple".

    Raises: CheckpointError when the keys are those of none, of several, or of an early conversion script.
    """
    keys = list(keys)
    counts = {
        name: count
        for name, layout in LAYOUTS.items()
        if (count := sum(key.startswith((*layout.first_words, *layout.towers)) for key in keys))
    }
    if len(counts) == 1:
        layout = LAYOUTS[next(iter(counts))]
        early = [key for key in keys if layout.early_keys and re.search(layout.early_keys, key)]
        if early:
            raise CheckpointError(
                f"{len(early)} keys such as {min(early)} are of an early version of the conversion script of "
                f"{layout.name}; "
                "convert the original checkpoint again"
            )
        return layout.name
    if counts:
        told = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise CheckpointError(
            f"the checkpoint mixes layouts ({told} among {len(keys)} keys); give a checkpoint in one layout"
        )
    some = ", ".join(sorted(keys)[:3]) or "none"
    *names, last = (f"{layout.name} ({', '.join(layout.first_words)})" for layout in LAYOUTS.values())
    raise CheckpointError(
        f"this is no AIMv2 checkpoint: its {len(keys)} keys ({some}, …) are in none of the layouts "
        f"{', '.join(names)} and {last}"
    )


def load(path: str | Path, dtype: torch.dtype | None = None) -> AIMv2:
    """The AIMv2 of a checkpoint: a safetensors file, or a directory with one or with shards, in any of `LAYOUTS`.

    Of a lit checkpoint it is the image tower. Heads and eps come from the config.json beside it; without one the sizes
    must be those of a released variant. `dtype` None keeps the checkpoint's, which must then be one for all its
    tensors.

    Raises: CheckpointError for anything left over, missing, mis-shaped or unreadable; ValueError for a dtype that holds
    no fractions.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"an AIMv2 computes in a floating-point dtype, not {dtype}")
    checkpoint = _read(Path(path))
    stored = {joined.parts[0].dtype for name, joined in checkpoint.tensors.items() if name.startswith(checkpoint.tower)}
    if not stored <= _DTYPES.keys():
        raise CheckpointError(
            f"{path} holds {', '.join(sorted(stored - _DTYPES.keys()))} tensors, which an AIMv2 cannot compute in"
        )
    if dtype is None and len(stored) > 1:
        raise CheckpointError(
            f"{path} mixes {', '.join(sorted(stored))}: say which one to load it in, such as load(path, "
            "dtype=torch.float32)"
        )
    with torch.device("meta"):
        model = AIMv2(checkpoint.config)
    model = model.to_empty(device="cpu").requires_grad_(False).eval()
    wanted = dtype or _DTYPES[min(stored)]
    loaded = {name: _tensor(checkpoint.tensors[checkpoint.tower + name], wanted) for name in model.state_dict()}
    model.load_state_dict(loaded, strict=True, assign=True)
    return model.requires_grad_(False)


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _tensor(joined: Joined, dtype: torch.dtype) -> Tensor:
    """A tensor read from its file or files, in `dtype`."""
    stored = torch.empty(joined.shape, dtype=_DTYPES[joined.parts[0].dtype])
    room = memoryview(stored.view(-1).view(torch.uint8).numpy())
    position = 0
    for part in joined.parts:
        with part.path.open("rb") as file:
            file.seek(part.start)
            if file.readinto(room[position : position + part.size]) != part.size:
                raise CheckpointError(f"{part.path} ended early; copy it again")
        position += part.size
    return stored.to(dtype)


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint whose every key was accounted for."""

    layout: Layout
    tower: str  # prefix of the image tower's tensors: "image_encoder." in lit, else ""
    config: AIMv2Config
    fields: dict | None  # config.json as it was found
    tensors: dict[str, Joined]  # by Apple's names


def _read(path: Path) -> _Checkpoint:
    """Read a checkpoint and check every key against the model that its sizes and its config describe."""
    entries, twice = read_checkpoint(path)
    layout = LAYOUTS[layout_of(entries)]
    tower = "image_encoder." if layout.has_lit(entries) else ""
    fields = config_beside(path)
    config = _config(entries, layout, tower, _vision_fields(fields), path)
    with torch.device("meta"):
        shapes = {tower + name: tuple(value.shape) for name, value in AIMv2(config).state_dict().items()}
    if tower:
        shapes |= _text_shapes(entries, layout, config.width)
    try:
        tensors = to_model(entries, shapes, layout.rules, layout.name, twice)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return _Checkpoint(layout, tower, config, fields, tensors)


def _own(name: str, layout: Layout) -> str:
    """The layout's key for one of the model's names, the first part of a fused one; "" where it has none."""
    rule = layout.rule_of(name)
    return rule.owns()[0] if rule else ""


def _sizes(entries: Mapping[str, TensorEntry], layout: Layout, prefix: str) -> tuple[int, int]:
    """Depth and hidden size of the tower with this prefix."""
    pattern = re.compile(
        re.escape(_own(prefix + "trunk.blocks.{i}.mlp.fc1.weight", layout)).replace(r"\{i\}", r"(\d+)")
    )
    blocks = {
        int(match[1]): entry
        for match, entry in ((pattern.fullmatch(key), entry) for key, entry in entries.items())
        if match
    }
    hidden = [entry.shape[0] for entry in blocks.values() if entry.shape]
    return len(blocks), max(set(hidden), key=hidden.count, default=0)


def _config(entries: Mapping[str, TensorEntry], layout: Layout, tower: str, fields: dict, path: Path) -> AIMv2Config:
    """The model's config: sizes from the shapes, heads and eps from config.json, or from the released variant of these
    sizes.
    """
    patch = entries.get(_own(tower + "preprocessor.patchifier.proj.weight", layout))
    if patch is None or len(patch.shape) != 4:
        result = "absent" if patch is None else f"{list(patch.shape)}"
        raise CheckpointError(
            f"{path}: {_own(tower + 'preprocessor.patchifier.proj.weight', layout)} is {result} where (D, 3, P, "
            "P) was expected"
        )
    depth, hidden = _sizes(entries, layout, tower)
    embedding = entries.get(_own(tower + "preprocessor.pos_embed", layout))
    side = None if embedding is None or len(embedding.shape) < 2 else math.isqrt(embedding.shape[-2])
    pool = _own(tower + "head.cls_token", layout) in entries
    width, channels, size, _ = patch.shape
    sizes = dict(
        width=width,
        depth=depth,
        hidden=hidden,
        image_size=None if side is None else side * size,
        pool=pool,
        patch=size,
        channels=channels,
    )
    _check_fields(fields, sizes, path)
    known = [variant for variant in VARIANTS.values() if {name: getattr(variant, name) for name in sizes} == sizes]
    heads = (
        fields.get("num_attention_heads")
        or fields.get("model_args", {}).get("num_heads")
        or (known[0].heads if known else None)
    )
    if not isinstance(heads, int) or heads < 1 or width % heads:
        wanted = f"num_attention_heads of {path if path.is_dir() else path.parent}/config.json"
        result = f"is {heads!r}" if heads is not None else "is missing and these sizes are no released variant's"
        raise CheckpointError(
            f"{wanted} {result}: the number of heads, which divides the width {width}, cannot be read from the weights"
        )
    return AIMv2Config(**sizes, heads=heads, eps=float(fields.get("rms_norm_eps", 1e-5)))


_FIELDS = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "hidden": "intermediate_size",
    "patch": "patch_size",
    "channels": "num_channels",
}


def _check_fields(fields: dict, sizes: dict, path: Path) -> None:
    """Refuse a config that contradicts the weights, or describes another architecture."""
    wrong = [
        f"{field} is {fields[field]} and the weights say {sizes[name]}"
        for name, field in _FIELDS.items()
        if field in fields and fields[field] != sizes[name]
    ]
    if sizes["image_size"] is not None and fields.get("image_size", sizes["image_size"]) != sizes["image_size"]:
        wrong.append(f"image_size is {fields['image_size']} and the weights say {sizes['image_size']}")
    if fields.get("is_native", sizes["image_size"] is None) != (sizes["image_size"] is None):
        wrong.append(
            f"is_native is {fields['is_native']} and the weights have "
            f"{'no' if sizes['image_size'] is None else 'learned'} positions"
        )
    wrong += [
        f"{name} is true, which no released AIMv2 has"
        for name in ("qkv_bias", "use_bias", "mlp_bias")
        if fields.get(name)
    ]
    if fields.get("hidden_act", "silu") != "silu":
        wrong.append(f"hidden_act is {fields['hidden_act']} where silu was expected")
    if wrong:
        raise CheckpointError(f"config.json of {path} does not fit its weights: {'; '.join(wrong)}")


def _vision_fields(fields: dict | None) -> dict:
    """The fields of the image tower in transformers', Apple's or timm's config."""
    result = (fields or {}).get("vision_config", fields) or {}
    return result if isinstance(result, dict) else {}


def _text_shapes(entries: Mapping[str, TensorEntry], layout: Layout, image_width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of lit's text tower and projections, by Apple's names; a tensor that is absent gets one that shows in
    the error.
    """
    words = entries.get(_own("text_encoder.preprocessor.text_embedding.weight", layout))
    embedding = entries.get(_own("text_encoder.preprocessor.positional_embedding", layout))
    projection = entries.get(_own("text_projector.weight", layout))
    vocabulary, width = words.shape if words is not None and len(words.shape) == 2 else (49408, 768)
    context = embedding.shape[0] if embedding is not None and embedding.shape else 77
    joint = projection.shape[0] if projection is not None and projection.shape else 768
    depth, hidden = _sizes(entries, layout, "text_encoder.")
    block = {"norm_1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width), "norm_2": (width,)}
    block |= {"mlp.fc1": (hidden, width), "mlp.fc3": (hidden, width), "mlp.fc2": (width, hidden)}
    shapes = {
        f"text_encoder.trunk.blocks.{i}.{name}.weight": shape for i in range(depth) for name, shape in block.items()
    }
    return shapes | {
        "text_encoder.trunk.post_trunk_norm.weight": (width,),
        "text_encoder.preprocessor.text_embedding.weight": (vocabulary, width),
        "text_encoder.preprocessor.positional_embedding": (context, width),
        "image_projector.weight": (joint, image_width),
        "text_projector.weight": (joint, width),
        "log_logit_scale": entries[_own("log_logit_scale", layout)].shape
        if _own("log_logit_scale", layout) in entries
        else (),
    }


def convert_checkpoint(source: str | Path, destination: str | Path, *, to: str) -> str:
    """Write a checkpoint and its config in another layout into a new directory, bit for bit. Returns what was done, in
    words.

    Raises: CheckpointError for a source that `load` refuses, a layout that cannot hold it, or a destination that
    exists.
    """
    source, destination = Path(source), Path(destination)
    if to not in LAYOUTS:
        raise ValueError(f"no layout is called {to!r}; there are {', '.join(LAYOUTS)}")
    checkpoint = _read(source)
    outputs = from_model(checkpoint.tensors, LAYOUTS[to].rules, to)
    with appearing(destination) as folder:
        names = write_checkpoint(folder, outputs)
        write_config(folder, _translated(checkpoint, LAYOUTS[to]))
    parameters = sum(math.prod(output.shape) for output in outputs)
    size = sum(output.size for output in outputs)
    return (
        f"{source} ({checkpoint.layout.name}) -> {destination} ({to}): {parameters:,} parameters in "
        f"{len(outputs)} tensors, {size:,} bytes in {len(names)} file{'s' if len(names) > 1 else ''}"
    )


def _translated(checkpoint: _Checkpoint, to: Layout) -> dict:
    """config.json for another layout; what no layout knows is carried along."""
    fields = dict(checkpoint.fields or {})
    if not checkpoint.tower:
        return _tower_fields(checkpoint.config, fields, to)
    vision = fields.get("vision_config") if isinstance(fields.get("vision_config"), dict) else {}
    text = fields.get("text_config") if isinstance(fields.get("text_config"), dict) else dict(LIT_TEXT)
    towers = {"vision_config": _tower_fields(checkpoint.config, vision, to), "text_config": text}
    return fields | dict(to.lit_class) | towers


LIT_TEXT = {  # of aimv2-large-patch14-224-lit, where no config says so
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 2048,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "rms_norm_eps": 1e-5,
}


def _tower_fields(config: AIMv2Config, result: dict, to: Layout) -> dict:
    """The config of the image tower in one layout: a field that another layout alone has is dropped."""
    foreign = {name for layout in LAYOUTS.values() if layout is not to for name in layout.own_fields}
    carried = {name: value for name, value in result.items() if name not in foreign}
    return carried | to.fields_of(config) | _common_fields(config, result)


def _common_fields(config: AIMv2Config, result: dict) -> dict:
    """The fields that all layouts share."""
    fields = {field: getattr(config, name) for name, field in _FIELDS.items()}
    fields |= {"num_attention_heads": config.heads, "rms_norm_eps": config.eps}
    fields |= {"image_size": config.image_size or result.get("image_size", 224)}
    return fields | {
        "qkv_bias": result.get("qkv_bias", False),
        "attention_dropout": result.get("attention_dropout", 0.0),
    }
