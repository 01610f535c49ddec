"""From a batch to a loss: draw, encode, pack, read, and count what was answered right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.demo_model import rendering
from examples.demo_model.layouts import Layouts
from examples.demo_model.loading import Batch
from examples.demo_model.network import OneVision
from examples.demo_model.packing import TOKENS
from examples.demo_model.samples import GROUPS, LABELS, SLOTS

_MOST = 16  # questions a buffer holds at most
TEXTS = ("ids", "group", "place", "target", "turn", "label")


@dataclass(frozen=True)
class DeviceLayouts:
    """`layouts.Layouts` as tensors."""

    index: Tensor
    weight: Tensor
    newline: Tensor
    rows: Tensor
    windows: Tensor

    @classmethod
    def of(cls, layouts: Layouts, device: torch.device) -> DeviceLayouts:
        names = ("index", "weight", "newline", "rows", "windows")
        return cls(*(torch.tensor(getattr(layouts, name), device=device) for name in names))


@dataclass(frozen=True)
class Joined:
    """A whole batch: tiles, packings and questions, the groups one after the other, then text."""

    pixels: Tensor  # exact tiles of all groups, then drawn ones: (tiles, TOKENS, 3 * PIXELS)
    kind: Tensor  # (drawn tiles, TOKENS)
    colour: Tensor
    exact: list[int]  # exact samples of each group
    drawn: list[int]
    matrices: list[Tensor]  # per group (samples, SLOTS, tiles * TOKENS)
    slots: Tensor  # (samples of text alone, SLOTS), ids that stand in place of media
    newline: Tensor  # (samples, SLOTS)
    rows: Tensor  # (samples,)
    texts: dict[str, Tensor]  # (samples, TEXT)


class Head(nn.Module):
    """What a tile's token shows; only there to teach the tower sooner, and not exported."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.out = nn.Linear(size, 5 + 9)

    def forward(self, features: Tensor, kind: Tensor, colour: Tensor) -> Tensor:
        logits = self.out(features).float().flatten(0, 1)
        first = F.cross_entropy(logits[:, :5], kind.flatten())
        return first + F.cross_entropy(logits[:, 5:], colour.flatten())


@torch.no_grad()
def join(drawn: list[Batch], exact: list[Batch], layouts: DeviceLayouts, compiled: bool) -> Joined:
    """Bring the parts of a batch together and draw what is to be drawn.

    drawn : `loading.drawn_part` of each group, then `loading.told_part`.
    """
    *drawn, text_only = drawn
    shapes, backs, windows, tiles = [], [], [], []
    index, weight, newline, rows = [], [], [], []
    for group, part, cut in zip(GROUPS, drawn, exact, strict=True):
        count = len(part["layout"])
        if group.media == "video":
            shape = rendering.at_times(part["shapes"][:, 0], part["times"])
        else:
            shape = part["shapes"].expand(-1, group.tiles, -1, -1)
        window = part["window"].expand(-1, group.tiles, -1)
        if group.media == "image":
            window = layouts.windows[part["layout"], : group.tiles]
        shapes.append(shape.reshape(count * group.tiles, *shape.shape[2:]))
        backs.append(part["back"].expand(-1, group.tiles, -1).reshape(count * group.tiles, -1))
        windows.append(window.reshape(count * group.tiles, -1))
        tiles.append(cut["tiles"].flatten(0, 1))
        index.append(torch.cat([cut["index"], layouts.index[part["layout"]]]))
        weight.append(torch.cat([cut["weight"], layouts.weight[part["layout"]]]))
        newline += [cut["newline"], layouts.newline[part["layout"]]]
        rows += [cut["rows"], layouts.rows[part["layout"]]]
    newline.append(torch.zeros_like(text_only["slots"], dtype=torch.bool))
    rows.append(text_only["length"])
    draw = _render if compiled else rendering.render
    drawing, kind, colour = draw(torch.cat(shapes), torch.cat(backs), torch.cat(windows))
    pixels = torch.cat([rendering.to_patches(torch.cat(tiles)).to(drawing.dtype), drawing])
    matrices = [
        matrix(i, w, group.tiles) for group, i, w in zip(GROUPS, index, weight, strict=True)
    ]
    texts = {
        name: torch.cat(
            [b[name] for pair in zip(exact, drawn, strict=True) for b in pair] + [text_only[name]]
        )
        for name in TEXTS
    }
    return Joined(
        pixels=pixels,
        kind=kind,
        colour=colour,
        exact=[len(cut["tiles"]) for cut in exact],
        drawn=[len(part["layout"]) for part in drawn],
        matrices=matrices,
        slots=text_only["slots"].long(),
        newline=torch.cat(newline),
        rows=torch.cat(rows).long(),
        texts={name: value.long() for name, value in texts.items()},
    )


def matrix(index: Tensor, weight: Tensor, tiles: int) -> Tensor:
    """Four indices and weights a row (n, SLOTS, 4) as matrices (n, SLOTS, tiles * TOKENS)."""
    dense = weight.new_zeros(len(index), SLOTS, tiles * TOKENS)
    return dense.scatter_add_(2, index.long(), weight)


def media_rows(model: OneVision, batch: Joined) -> tuple[Tensor, Tensor]:
    """Packed media (samples, SLOTS, text) and the drawn tiles' features."""
    features = model.features(batch.pixels)
    exact_tiles = sum(n * g.tiles for n, g in zip(batch.exact, GROUPS, strict=True))
    packed, at, later = [], 0, exact_tiles
    for group, exact, drawn, dense in zip(
        GROUPS, batch.exact, batch.drawn, batch.matrices, strict=True
    ):
        first = features[at : at + exact * group.tiles]
        second = features[later : later + drawn * group.tiles]
        at, later = at + exact * group.tiles, later + drawn * group.tiles
        both = torch.cat([first, second]).view(exact + drawn, group.tiles * TOKENS, -1)
        packed.append(dense.to(both.dtype) @ both)
    packed.append(model.language_model.model.embed_tokens(batch.slots).to(packed[0].dtype))
    return torch.cat(packed), features[exact_tiles:]


def answer_loss(hidden: Tensor, table: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each token (0 where there is no target), and whether it would be said wrongly."""
    logits = F.linear(hidden, table).float()
    loss = F.cross_entropy(
        logits.flatten(0, 1), target.flatten(), ignore_index=-1, reduction="none"
    ).view_as(target)
    wrong = (logits.argmax(-1) != target) & (target >= 0)
    return loss, wrong


def forward(
    model: OneVision, batch: Joined, prefix: Tensor, compiled: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each token (samples, TEXT), which are wrong, and the drawn tiles' features."""
    media, features = media_rows(model, batch)
    text = batch.texts
    hidden = model.read(
        media, batch.newline, batch.rows, prefix, text["ids"], text["group"], text["place"]
    )
    table = model.language_model.model.embed_tokens.weight
    score = _answer_loss if compiled else answer_loss
    loss, wrong = score(hidden, table, text["target"])
    return loss, wrong, features


def by_label(values: Tensor, label: Tensor, where: Tensor) -> Tensor:
    """Sums of the values (n, TEXT) for each label (LABELS,)."""
    sums = torch.zeros(len(LABELS), device=values.device)
    return sums.scatter_add(0, label.flatten(), (values.float() * where).flatten())


@torch.no_grad()
def answers(wrong: Tensor, text: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Questions and wholly right answers for each label."""
    n = len(wrong)
    target = text["target"] >= 0
    slots = torch.zeros(n, _MOST, device=wrong.device)
    asked = slots.scatter_add(1, text["turn"], target.float()) > 0
    missed = slots.scatter_add(1, text["turn"], wrong.float()) > 0
    label = torch.zeros(n, _MOST, dtype=torch.long, device=wrong.device)
    label = label.scatter_reduce(1, text["turn"], text["label"] * target, "amax")
    right = asked & ~missed
    return by_label(asked, label, asked), by_label(right, label, asked)


_render = torch.compile(rendering.render, dynamic=False)
_answer_loss = torch.compile(answer_loss, dynamic=False)
