"""A plain vision transformer."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def patch_size_for(height: int, width: int) -> int:
    """The largest patch of at most 16 pixels that divides the image and leaves at least 7 patches a side.

    28 → 4, 32 → 4, 64 → 8, 96 → 12, 224 → 16. An image that no such patch divides is cut into single pixels, which is
    slow: give it a size with divisors, or a patch size.
    """
    common = math.gcd(height, width)
    most = min(16, height // 7, width // 7)
    return max([p for p in range(1, most + 1) if common % p == 0], default=1)


def sine_positions(rows: int, columns: int, width: int) -> Tensor:
    """Fixed positions [rows · columns, width]: sines and cosines of the row and of the column, a quarter each."""
    frequencies = 10000.0 ** -torch.linspace(0, 1, width // 4)
    angles = [torch.arange(n)[:, None] * frequencies for n in (rows, columns)]
    row = angles[0][:, None].expand(rows, columns, -1)
    column = angles[1][None].expand(rows, columns, -1)
    return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=-1).flatten(0, 1)


class Attention(nn.Module):
    """Multi-head self-attention: [B, tokens, width] → the same."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # unflatten and transpose give [3, B, heads, tokens, width / heads]
        q, k, v = self.query_key_value(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        output: Tensor = self.output(y.transpose(1, 2).flatten(2))
        return output


class Block(nn.Module):
    """Attention and two dense layers, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(mlp_width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        output: Tensor = x + self.mlp(self.norm2(x))
        return output


class ViT(nn.Module):
    """Vision transformer: [B, C, H, W] → [B, num_outputs].

    The simpler form of Beyer et al. 2022 ("Better plain ViT baselines"): fixed sine positions and the mean over tokens
    instead of learned positions and a class token. All parameters belong to linear, convolution and norm layers,
    which is what gradients per sample and quantizers can handle. `patch_size` null: chosen from the image size.

    Raises:
        ValueError: the patch does not divide the image, or `heads` not the width.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_outputs: int,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
        mlp_ratio: float = 4.0,
        patch_size: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels, height, image_width = input_shape
        for name, message in self.check_arguments(
            {"input_shape": input_shape, "patch_size": patch_size, "width": width, "heads": heads}
        ):
            raise ValueError(f"{name} {message}")
        patch = patch_size or patch_size_for(height, image_width)
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        # No part of the state dict: the positions follow from the shapes.
        positions = sine_positions(height // patch, image_width // patch, width)
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.Sequential(*(Block(width, heads, round(mlp_ratio * width), dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_outputs)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)  # as in BERT and in timm's ViT
                nn.init.zeros_(module.bias)
        fan_in = channels * patch * patch
        nn.init.trunc_normal_(self.patches.weight, std=math.sqrt(1 / fan_in))

    @staticmethod
    def check_arguments(arguments: dict[str, object]) -> list[tuple[str, str]]:
        """Sizes that do not divide each other."""
        found = []
        shape, patch = arguments.get("input_shape"), arguments.get("patch_size")
        if isinstance(shape, (list, tuple)) and isinstance(patch, int) and any(s % patch for s in shape[1:]):
            found.append(("patch_size", f"{patch} does not divide the image of {shape[1]}×{shape[2]} pixels"))
        width, heads = arguments.get("width", 192), arguments.get("heads", 3)
        if isinstance(width, int) and isinstance(heads, int) and (width % heads or width % 4):
            found.append(("width", f"{width} is no multiple of heads ({heads}) and of 4"))
        return found

    def tensor_parallel_plan(self) -> dict[str, Any]:
        """How a block's dense layers are divided over devices: the first by its outputs, the second by its inputs, and
        one sum puts them together (Shoeybi et al. 2019). Dropout between them draws the same on each device.
        """
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

        return {"blocks.*.mlp.0": ColwiseParallel(), "blocks.*.mlp.3": RowwiseParallel()}

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        x = self.norm(self.blocks(x)).mean(dim=1)
        output: Tensor = self.head(x)
        return output
