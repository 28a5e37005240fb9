"""What a video tower has after its frame encoder: the adapters, and a transformer over time with positions that can be stretched."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.towers.base import plain_attention


class Bottleneck(nn.Module):
    """f + up(GELU(down(LN(f)))), a quarter as wide in between. `up` begins at zero: a new adapter changes nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.down, self.up = nn.LayerNorm(width), nn.Linear(width, max(1, width // 4)), nn.Linear(max(1, width // 4), width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, frames: Tensor, tokens: Tensor | None = None) -> Tensor:
        return frames + self.up(F.gelu(self.down(self.norm(frames))))


class AttentionPool(nn.Module):
    """f + what f attends to among its frame's patches (tokens [b, t, n, columns]); the output map begins at zero."""

    def __init__(self, width: int, columns: int, heads: int) -> None:
        super().__init__()
        self.query, self.key = nn.LayerNorm(width), nn.LayerNorm(columns)
        self.attention = nn.MultiheadAttention(width, heads, kdim=columns, vdim=columns, batch_first=True)
        nn.init.zeros_(self.attention.out_proj.weight)
        nn.init.zeros_(self.attention.out_proj.bias)

    def forward(self, frames: Tensor, tokens: Tensor) -> Tensor:
        keys = self.key(tokens).flatten(0, 1)
        found, _ = self.attention(self.query(frames).flatten(0, 1)[:, None], keys, keys, need_weights=False)
        return frames + found[:, 0].unflatten(0, frames.shape[:2])


class Temporal(nn.Module):
    """Pre-norm transformer over the frames' features [b, t, width] and a CLS token -> [b, width]: the CLS token, or the mean over frames."""

    def __init__(self, width: int, layers: int, heads: int, length: int, mean: bool, std: float) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        self.mean = mean
        self.token = nn.Parameter(std * torch.randn(1, 1, width))
        self.position = nn.Parameter(std * torch.randn(1, 1 + length, width))
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, frames: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(frames), -1, -1).to(frames.dtype), frames], 1) + self.position
        with plain_attention(x.device):
            for block in self.blocks:
                x = block(x)
        x = self.norm(x)
        return x[:, 1:].mean(1) if self.mean else x[:, 0]


def stretch(position: Tensor, length: int) -> Tensor:
    """Positions [1, 1 + t, width] for another number of frames [1, 1 + length, width]: CLS is kept, the others are interpolated linearly,
    first and last frame staying first and last."""
    first, rest = position[:, :1], position[:, 1:]
    return torch.cat([first, F.interpolate(rest.transpose(1, 2), length, mode="linear", align_corners=True).transpose(1, 2)], 1)


def central(kernel: Tensor, frames: int) -> Tensor:
    """A patch embedding [w, 3, p, p] as one of tubelets [w, 3, frames, p, p] that looks at the middle frame only (Arnab et al. 2021)."""
    out = kernel.new_zeros(*kernel.shape[:2], frames, *kernel.shape[2:])
    out[:, :, frames // 2] = kernel
    return out
