"""The layouts of AIMv2's checkpoints: the keys and the fields of config.json, as several libraries write them.

`LAYOUTS` declares each layout once. Reading, writing and the recognition of a checkpoint, messages and the help of
`python -m harness convert` follow that table. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.checkpoints.conversion import Fuse, Rename, Rule

if TYPE_CHECKING:
    from harness.models.aimv2 import AIMv2Config


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one library writes an AIMv2."""

    name: str
    rules: tuple[Rule, ...]  # between its keys and Apple's, which are the model's
    first_words: tuple[str, ...]  # the first words of the keys of an image tower alone
    towers: tuple[str, ...] = ()  # the prefixes of lit's image and text tower; empty where the layout has no lit
    early_keys: str | None = None  # a pattern of keys that an early conversion script wrote
    tower_class: Mapping[str, Any] = field(default_factory=dict)  # the fields that name the class of an image tower
    lit_class: Mapping[str, Any] = field(default_factory=dict)  # the fields that name the class of lit
    architecture: str | None = None  # how the field `architecture` begins, where the layout has that field
    own_fields: Mapping[str, Callable[[AIMv2Config], Any]]  # fields that no other layout has; None leaves one out

    def rule_of(self, name: str) -> Rule | None:
        """The rule for one of the model's names, with `{i}` for a number; None where the layout has no such tensor."""
        return next((rule for rule in self.rules if rule.model == name), None)

    def has_lit(self, keys: Iterable[str]) -> bool:
        """Whether these keys, in this layout, are those of lit."""
        return bool(self.towers) and any(key.startswith(self.towers[0]) for key in keys)

    def fields_of(self, config: AIMv2Config) -> dict[str, Any]:
        """The fields of an image tower's config.json that this layout has beside the common ones."""
        values = {name: make(config) for name, make in self.own_fields.items()}
        return {**self.tower_class, **{name: value for name, value in values.items() if value is not None}}


# -------- names of tensors

_TRUNK = {  # Apple's names of one transformer, vision or text, to those of transformers
    "trunk.blocks.{i}.norm_1.weight": "encoder.layers.{i}.rms_norm1.weight",
    "trunk.blocks.{i}.attn.proj.weight": "encoder.layers.{i}.attention.out_proj.weight",
    "trunk.blocks.{i}.norm_2.weight": "encoder.layers.{i}.rms_norm2.weight",
    "trunk.blocks.{i}.mlp.fc1.weight": "encoder.layers.{i}.ffn.gate_proj.weight",
    "trunk.blocks.{i}.mlp.fc3.weight": "encoder.layers.{i}.ffn.up_proj.weight",
    "trunk.blocks.{i}.mlp.fc2.weight": "encoder.layers.{i}.ffn.down_proj.weight",
    "trunk.post_trunk_norm.weight": "rms_norm.weight",
}
_VISION = _TRUNK | {
    "preprocessor.patchifier.proj.weight": "embeddings.patch_embed.weight",
    "preprocessor.patchifier.proj.bias": "embeddings.patch_embed.bias",
    "preprocessor.patchifier.norm.weight": "embeddings.rms_norm.weight",
    "head.cls_token": "head.cls_token",
    "head.k.weight": "head.k_proj.weight",
    "head.v.weight": "head.v_proj.weight",
    "head.linear.weight": "head.output_proj.weight",
    "head.linear.bias": "head.output_proj.bias",
}
_TEXT = _TRUNK | {
    "preprocessor.text_embedding.weight": "embeddings.token_embedding.weight",
    "preprocessor.positional_embedding": "embeddings.position_embedding.weight",
}
_TIMM = {
    "preprocessor.patchifier.proj.weight": "patch_embed.proj.weight",
    "preprocessor.patchifier.proj.bias": "patch_embed.proj.bias",
    "preprocessor.patchifier.norm.weight": "patch_embed.norm.weight",
    "preprocessor.pos_embed": "pos_embed",
    "trunk.blocks.{i}.norm_1.weight": "blocks.{i}.norm1.weight",
    "trunk.blocks.{i}.attn.qkv.weight": "blocks.{i}.attn.qkv.weight",
    "trunk.blocks.{i}.attn.proj.weight": "blocks.{i}.attn.proj.weight",
    "trunk.blocks.{i}.norm_2.weight": "blocks.{i}.norm2.weight",
    "trunk.blocks.{i}.mlp.fc1.weight": "blocks.{i}.mlp.fc1_g.weight",
    "trunk.blocks.{i}.mlp.fc3.weight": "blocks.{i}.mlp.fc1_x.weight",
    "trunk.blocks.{i}.mlp.fc2.weight": "blocks.{i}.mlp.fc2.weight",
    "trunk.post_trunk_norm.weight": "norm.weight",
}
_LIT = {
    "image_projector.weight": "visual_projection.weight",
    "text_projector.weight": "text_projection.weight",
    "log_logit_scale": "logit_scale",
}


def _split_rules(names: dict[str, str], own: str = "", model: str = "") -> list[Rule]:
    """The rules of one transformer between transformers' layout and Apple's, with the prefixes that a tower gives
    them.
    """
    layer = own + "encoder.layers.{i}.attention."
    return [
        *(Rename(own + theirs, model + ours) for ours, theirs in names.items()),
        Fuse(tuple(f"{layer}{part}_proj.weight" for part in "qkv"), model + "trunk.blocks.{i}.attn.qkv.weight"),
        Rename(own + "embeddings.position_embedding.weight", model + "preprocessor.pos_embed", added=1),
    ]


def _same(names: Iterable[str], prefix: str = "") -> list[Rule]:
    return [
        Rename(prefix + name, prefix + name)
        for name in (*names, "trunk.blocks.{i}.attn.qkv.weight", "preprocessor.pos_embed")
    ]


# -------- config.json of timm

_TIMM_PREFIX = "aimv2_"


def _timm_name(config: AIMv2Config) -> str:
    return f"{_TIMM_PREFIX}{config.size_name}_patch{config.patch}_{config.image_size or 224}"


def _timm_arguments(config: AIMv2Config) -> dict[str, Any]:
    return dict(
        img_size=config.image_size or 224,
        patch_size=config.patch,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
    )


# -------- the layouts

LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            name="apple",
            rules=(
                *_same(_VISION),
                *_same(_VISION, "image_encoder."),
                *_same(_TEXT, "text_encoder."),
                *(Rename(name, name) for name in _LIT),
            ),
            first_words=("preprocessor.", "trunk."),
            towers=("image_encoder.", "text_encoder."),
            tower_class={"architectures": ["AIMv2Model"], "model_type": "aimv2"},
            lit_class={"architectures": ["AIMv2Model"], "model_type": "aimv2"},
            own_fields={
                "use_bias": lambda config: False,
                "projection_dropout": lambda config: 0.0,
                "num_queries": lambda config: 1 if config.pool else None,
            },
        ),
        Layout(
            name="transformers",
            rules=(
                *_split_rules(_VISION),
                *_split_rules(_VISION, "vision_model.", "image_encoder."),
                *_split_rules(_TEXT, "text_model.", "text_encoder."),
                *(Rename(theirs, ours) for ours, theirs in _LIT.items()),
            ),
            first_words=("embeddings.", "encoder."),
            towers=("vision_model.", "text_model."),
            early_keys=r"\.attention\.proj_out\.|\.ffn\.fc[12]\.",
            tower_class={"architectures": ["Aimv2VisionModel"], "model_type": "aimv2_vision_model"},
            lit_class={"architectures": ["Aimv2Model"], "model_type": "aimv2"},
            own_fields={
                "hidden_act": lambda config: "silu",
                "mlp_bias": lambda config: False,
                "use_head": lambda config: config.pool,
                "is_native": lambda config: config.image_size is None,
            },
        ),
        Layout(
            name="timm",
            rules=tuple(Rename(theirs, ours) for ours, theirs in _TIMM.items()),
            first_words=("patch_embed.", "blocks."),
            architecture=_TIMM_PREFIX,
            own_fields={
                "architecture": _timm_name,
                "num_features": lambda config: config.width,
                "model_args": _timm_arguments,
            },
        ),
    )
}


def layout_names() -> str:
    """The names of all layouts in words: "apple, transformers or timm"."""
    *names, end = LAYOUTS
    return f"{', '.join(names)} or {end}"


def is_tower_config(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an image tower of AIMv2 in one of the layouts."""
    classes = fields.get("architectures") or []
    if classes:
        return any(classes[0] in layout.tower_class.get("architectures", ()) for layout in LAYOUTS.values())
    name = str(fields.get("architecture", ""))
    return any(layout.architecture and name.startswith(layout.architecture) for layout in LAYOUTS.values())
