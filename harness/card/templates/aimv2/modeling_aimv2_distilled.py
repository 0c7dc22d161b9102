"""The AIMv2 vision encoder in plain torch: every operator runs on an Ascend NPU as it is.

Architecture: Fini et al., "Multimodal Autoregressive Pre-training of Large Vision Encoders", arXiv 2411.14402.
The names of the weights are those of Apple's own checkpoints, with query, key and value in one matrix.
"""

import torch
from configuration_aimv2_distilled import AIMv2Config
from torch import nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """z / sqrt(mean(z^2) + eps) * weight over the last axis."""

    def __init__(self, width, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Patchifier(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=size, stride=size)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, pixel_values):
        return self.norm(self.proj(pixel_values).flatten(2).transpose(1, 2))


class Preprocessor(nn.Module):
    """Pixels (B, 3, H, W) to tokens (B, N, D); the position is added after the norm."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patchifier = Patchifier(config)
        if config.image_size is not None:
            count = (config.image_size // config.patch_size) ** 2
            self.pos_embed = nn.Parameter(torch.zeros(1, count, config.hidden_size))

    def forward(self, pixel_values):
        tokens = self.patchifier(pixel_values)
        if self.config.image_size is not None:
            return tokens + self.pos_embed
        height, width = (size // self.config.patch_size for size in pixel_values.shape[2:])
        return tokens + sine_positions(height, width, self.config.hidden_size).to(tokens)


def sine_positions(height, width, dim):
    """(1, height * width, dim): sine and cosine of the column, then of the row."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows = torch.arange(height, dtype=torch.float64).repeat_interleave(width)
    columns = torch.arange(width, dtype=torch.float64).repeat(height)
    angles = [position[:, None] * omega for position in (columns, rows)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)[None]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x):
        batch, count, width = x.shape
        qkv = self.qkv(x).view(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(mixed.transpose(1, 2).reshape(batch, count, width))


class SwiGLU(nn.Module):
    """fc2(silu(fc1 x) * fc3 x)."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.fc3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x):
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config)
        self.norm_2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x):
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Trunk(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.post_trunk_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens):
        for block in self.blocks:
            tokens = block(tokens)
        return self.post_trunk_norm(tokens)


class AttentionPool(nn.Module):
    """One learned query looks at all tokens; of the released models only the image tower of lit has it."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.k = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.linear = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, features):
        batch, _, width = features.shape
        split = [
            tokens.view(batch, -1, self.heads, width // self.heads).transpose(1, 2)
            for tokens in (self.cls_token.expand(batch, -1, -1), self.k(features), self.v(features))
        ]
        return self.linear(F.scaled_dot_product_attention(*split).reshape(batch, width))


class AIMv2Model(nn.Module):
    """`model(pixel_values)` gives the features (B, N, D) of every patch after the last norm."""

    def __init__(self, config: AIMv2Config):
        super().__init__()
        self.config = config
        self.preprocessor = Preprocessor(config)
        self.trunk = Trunk(config)
        if config.use_head:
            self.head = AttentionPool(config)

    def forward(self, pixel_values):
        return self.trunk(self.preprocessor(pixel_values))

    def pool(self, features):
        """One vector (B, D) a picture, of a model with the attention pool."""
        return self.head(features)
