"""Hold the trainer's mathematics against transformers, on pictures, several images and videos.

    PYTHONPATH=. python -m examples.demo_model.check FOLDER

FOLDER is a float32 export. The same drawings go through transformers' own processor and model, one
question at a time, and through the trainer's batched, packed form. Needs transformers and
torchvision.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

with contextlib.suppress(ImportError):
    from parity import torchvision_ops  # noqa: F401  with tests on the path: a CUDA wheel on a CPU
from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

from examples.demo_model import layouts, learning, samples
from examples.demo_model.buffers import Buffers
from examples.demo_model.drawing import draw_scene
from examples.demo_model.loading import to_device
from examples.demo_model.making import drawn_part, told_part
from examples.demo_model.network import OneVision
from examples.demo_model.samples import GROUPS, Medium
from examples.demo_model.scenes import sample_size
from examples.demo_model.sizes import Shape
from examples.demo_model.tiling import CONFIG
from examples.demo_model.words import VOCABULARY, Words, build_tokenizer
from mlx_onevision.media.resize import resize
from mlx_onevision.media.tiles import pad_to_square_tile, tile_image

TOLERANCE = 1e-4


def cut(medium: Medium, pictures: list[np.ndarray]) -> np.ndarray:
    if medium.video:
        return np.stack([resize(picture, (CONFIG.size, CONFIG.size)) for picture in pictures])
    if len(pictures) == 1:
        return tile_image(pictures[0], CONFIG)
    return np.concatenate([pad_to_square_tile(picture, CONFIG) for picture in pictures])


@torch.no_grad()
def main(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    reference = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype="float32")
    model = OneVision(Shape(VOCABULARY))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    words = Words(build_tokenizer())
    numbered = layouts.make_layouts(0, 4)
    device = torch.device("cpu")
    packings = learning.DeviceLayouts.of(numbered, device)
    rng = Random(5)
    blank = [to_device(drawn_part(g, 1, numbered, words, rng, 4), device) for g in GROUPS]
    blank.append(to_device(told_part(8, words, rng), device))
    worst = 0.0
    for _ in range(3):
        exact, cases = [], []
        for group in GROUPS:
            size = sample_size(rng)
            while group.media == "image" and layouts.image_group(size) is not group:
                size = sample_size(rng)
            medium = samples.sample_medium(rng, group, size, 4, largest=360)
            while group.media == "images" and not medium.scenes:
                medium = samples.sample_medium(rng, group, size, 4, largest=360)
            times = medium.times or (0.0,)
            pictures = [
                np.asarray(draw_scene(scene, rng, time, smooth=True))
                for scene in medium.scenes
                for time in times
            ]
            tiles = np.zeros((1, group.tiles, CONFIG.size, CONFIG.size, 3), np.uint8)
            exactly = cut(medium, pictures)
            tiles[0, : len(exactly)] = exactly
            index, weight, newline, rows = layouts.stack_rows([layouts.medium_rows(medium)])
            buffers = Buffers.empty(1)
            turns = samples.ask(rng, medium)
            buffers.fill(0, turns, words, rng)
            part = {"index": index, "weight": weight, "newline": newline, "rows": rows}
            exact.append(to_device(part | {"tiles": tiles} | vars(buffers), device))
            cases.append((medium, pictures, buffers))
        batch = learning.join(blank, exact, packings, False)
        media, _ = learning.media_rows(model, batch)
        text = batch.texts
        prefix = torch.tensor(words.prefix)
        hidden = model.read(
            media, batch.newline, batch.rows, prefix, text["ids"], text["group"], text["place"]
        )
        ours = F.linear(hidden, model.language_model.model.embed_tokens.weight)
        text_only, ours = ours[-len(batch.slots) :], ours[::2]  # text; of each group, the exact one
        for row, mine in enumerate(text_only):
            text = {name: value[row - len(text_only)] for name, value in batch.texts.items()}
            before = batch.slots[row][: batch.rows[row - len(text_only)]].tolist()
            for number in range(1, int(text["group"].max()) + 1):
                where = text["group"] == number
                ids = [*before, *text["ids"][where].tolist()]
                theirs = refer(processor, reference, Medium(()), [], words, ids)[len(before) :]
                worst = max(worst, (theirs - mine[where]).abs().max().item())
        for row, (medium, pictures, buffers) in enumerate(cases):
            for number in range(1, int(buffers.group[0].max()) + 1):
                where = buffers.group[0] == number
                ids = buffers.ids[0][where].tolist()
                theirs = refer(processor, reference, medium, pictures, words, ids)
                mine = ours[row][torch.from_numpy(where)]
                worst = max(worst, (theirs - mine).abs().max().item())
        print(f"largest difference so far {worst:.2e} of logits up to {ours.abs().max():.1f}")
    if worst > TOLERANCE:
        raise SystemExit(f"the trainer is not transformers: {worst:.2e} > {TOLERANCE:.0e}")


def refer(
    processor: Any,  # transformers says of an AutoProcessor only that it is one
    reference: LlavaOnevisionForConditionalGeneration,
    medium: Medium,
    pictures: list[np.ndarray],
    words: Words,
    ids: list[int],
) -> torch.Tensor:
    """transformers' logits behind each token of one question."""
    images = [torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures]
    mark = "<video>" if medium.video else "<image>" * len(images)
    prompt = f"<|im_start|>user {mark}" + words.tokenizer.decode(ids, skip_special_tokens=False)
    given = {}
    if images:
        given = {"videos": [torch.stack(images)]} if medium.video else {"images": [images]}
    inputs = processor(text=[prompt], **given, return_tensors="pt")
    assert inputs["input_ids"][0, -len(ids) :].tolist() == ids, "the tokens differ"
    return reference(**inputs).logits[0, -len(ids) :]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
