"""Tiles of a scene drawn by torch, straight at their own pixels: thousands of pictures a second.

A tile is a window onto the picture: each of its pixels looks at one place of the drawing, whatever
the picture's size is. Edges are softened by about a tile pixel, which is what resampling makes of
them; exact tiles (drawn at full size, resampled, cut) are mixed in during training.

Shape numbers (`samples.scene_numbers`): 0-2 centre and radius, 3-5 the same at a video's end, 6-7
cosine and sine of the angle, 8 half the angle between two corners, 9-10 direction from an outer
corner to the inner one beside it, 11 stretch, 12-14 colour, 15 there at all, 16 a circle, 17-18
kind and colour as numbers from 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from examples.demo_model.packing import PATCH, PATCHES, TOKENS

PIXELS = PATCH * PATCH
SEEN = 0.1  # share of a token's pixels from which on a shape counts as seen there


def to_patches(tiles: Tensor) -> Tensor:
    """uint8 tiles (n, TILE, TILE, 3) as pixel values (n, TOKENS, 3 * PIXELS), -1 to 1."""
    cut = tiles.view(-1, PATCHES, PATCH, PATCHES, PATCH, 3).permute(0, 1, 3, 5, 2, 4)
    return ((cut.float() - 127.5) / 127.5).reshape(-1, TOKENS, 3 * PIXELS)


def at_times(shapes: Tensor, times: Tensor) -> Tensor:
    """Shapes (n, SHAPES, F) of videos at `times` (n, t): (n, t, SHAPES, F)."""
    time = times[:, :, None, None]
    now = shapes[:, None, :, 0:3] * (1 - time) + shapes[:, None, :, 3:6] * time
    rest = shapes[:, None, :, 3:].expand(-1, times.shape[1], -1, -1)
    return torch.cat([now, rest], -1)


def render(shapes: Tensor, back: Tensor, window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw n tiles.

    shapes : (n, SHAPES, F); back : (n, 11); window : (n, 5), `packing.tile_windows`.
    Returns pixel values (n, TOKENS, 3 * PIXELS), -1 to 1, and for each token the number of the kind
    and of the colour that fill most of it (n, TOKENS), 0 for none.
    """
    device = shapes.device
    pixel = torch.arange(TOKENS * PIXELS, device=device)
    token, inside = pixel // PIXELS, pixel % PIXELS
    u = (token % PATCHES) * PATCH + inside % PATCH
    v = (token // PATCHES) * PATCH + inside // PATCH
    x0, dx, y0, dy, fill = (window[:, i, None] for i in range(5))  # (n, 1)
    wide, high = back[:, 9, None], back[:, 10, None]
    scale = torch.sqrt(dx * dy)  # picture pixels a tile pixel
    soft = torch.clamp(0.5 * scale, min=0.7) * (0.6 + torch.rand_like(scale))
    cover = [torch.zeros(len(shapes), TOKENS * PIXELS, device=device) for _ in range(4)]
    for oy in (0.25, 0.75):
        for ox in (0.25, 0.75):
            x, y = x0 + dx * (u + ox), y0 + dy * (v + oy)  # (n, pixels)
            for index in range(4):
                cover[index] = cover[index] + 0.25 * _cover(shapes[:, index], x, y, soft)
    x, y = x0 + dx * (u + 0.5), y0 + dy * (v + 0.5)
    share = 0.5 + back[:, 6, None] * (x / wide - 0.5) + back[:, 7, None] * (y / high - 0.5)
    noise = back[:, 8, None] / torch.clamp(scale, min=1.0)
    # Some tiles are a little uneven all over, shapes included, as compressed ones are.
    grain = torch.clamp(8 * torch.rand_like(scale) - 5, min=0)
    outside = (x < 0) | (y < 0) | (x > wide) | (y > high)
    planes = []
    for channel in range(3):
        first, second = back[:, channel, None], back[:, 3 + channel, None]
        random = torch.randn_like(share)
        level = first + (second - first) * share + random * noise
        for index in range(4):
            tone = shapes[:, index, 12 + channel, None]
            level = level + (tone - level) * cover[index]
        level = level + random * grain
        level = torch.where(outside, fill, level)
        planes.append(torch.round(torch.clamp(level, 0, 255)))
    values = torch.stack([plane.view(-1, TOKENS, PIXELS) for plane in planes], 2)
    seen = torch.stack([c.view(-1, TOKENS, PIXELS).mean(-1) for c in cover], -1)  # (n, TOKENS, 4)
    most, which = seen.max(-1)
    there = most > SEEN
    kind = torch.gather(shapes[:, :, 17], 1, which) * there
    colour = torch.gather(shapes[:, :, 18], 1, which) * there
    pixels = ((values - 127.5) / 127.5).view(-1, TOKENS, 3 * PIXELS)
    return pixels, kind.long(), colour.long()


def _cover(shape: Tensor, x: Tensor, y: Tensor, soft: Tensor) -> Tensor:
    """How much of a spot (n, pixels) one shape (n, F) fills, 0 to 1."""
    part = [shape[:, i, None] for i in range(17)]
    x, y = x - part[0], y - part[1]
    radius, cos, sin, half, ex, ey = part[2], *part[6:11]
    along, down = (x * cos + y * sin) / part[11], y * cos - x * sin
    length = torch.sqrt(along * along + down * down + 1e-12)
    angle = torch.atan2(along, -down) + half  # 0 at the first corner, clockwise
    angle = (angle - torch.floor(angle / (2 * half)) * (2 * half) - half).abs()
    # Folded onto one side of one corner, the outline is a straight line.
    polygon = ey * (length * torch.cos(angle) - radius) - ex * (length * torch.sin(angle))
    distance = torch.where(part[16] > 0.5, length - radius, polygon)
    return torch.clamp(0.5 - distance / soft, 0, 1) * part[15]
