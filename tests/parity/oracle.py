"""The reference: transformers on a checkpoint folder, with what each stage computed.

The default processors are used (the torchvision-backed ones), conversations go through
``apply_chat_template(tokenize=True)``, and everything runs in float32 on the CPU.
"""

# pyright: reportMissingImports=false
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parity.torchvision_ops import torchvision  # before transformers

import transformers  # isort: skip
from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration  # isort: skip

VERSIONS = {module.__name__: module.__version__ for module in (torch, torchvision, transformers)}

Messages = Sequence[dict[str, Any]]


@dataclass
class Stages:
    """What the reference computed for one conversation, in the order in which it does.

    ids : int64 (L,), placeholders expanded
    tiles : float32 (tiles, 3, S, S), of all images, padding tiles left out
    sizes : (height, width) of each image
    tower : float32 (tiles, patches, width), the selected hidden states
    projected : float32 (tiles, patches, D)
    packed : float32 (rows, D) for each image, newlines included
    logits : float32 (L, vocabulary)
    tokens : greedy continuation, the end token included where it came
    margins : for each of ``tokens``, by how much the best logit led the second
    """

    ids: np.ndarray
    tiles: np.ndarray
    sizes: list[tuple[int, int]]
    tower: np.ndarray
    projected: np.ndarray
    packed: list[np.ndarray]
    logits: np.ndarray
    tokens: list[int]
    margins: list[float] = field(default_factory=list)


@dataclass
class Media:
    """What the reference computed for one conversation with videos, by kind of medium.

    pixels : float32 (n, 3, S, S) of each, padding tiles left out.
    rows : float32 (rows, D) of each, newlines included.
    The rest as in :class:`Stages`.
    """

    ids: np.ndarray
    pixels: dict[str, list[np.ndarray]]
    rows: dict[str, list[np.ndarray]]
    logits: np.ndarray
    tokens: list[int]
    margins: list[float]


class Oracle:
    """A checkpoint folder, run by transformers.

    Raises:
        AssertionError: if transformers did not find every tensor that it wanted in the folder; it
            would have drawn the missing ones at random.
    """

    def __init__(self, folder: Path, weights: Path | None = None) -> None:
        """``weights`` is another folder to take the network from, for example the dequantised
        twin of a quantised ``folder``.
        """
        self.processor = AutoProcessor.from_pretrained(folder)
        assert "Pil" not in type(self.processor.image_processor).__name__
        build: Any = LlavaOnevisionForConditionalGeneration.from_pretrained
        model, report = build(weights or folder, dtype=torch.float32, output_loading_info=True)
        assert not report["missing_keys"], report["missing_keys"]
        assert not report["mismatched_keys"], report["mismatched_keys"]
        self.model = model.eval()

    def render(self, messages: Messages) -> str:
        """The prompt text, placeholders not expanded."""
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)

    def prepare(self, messages: Messages, **options: Any) -> dict[str, torch.Tensor]:
        """The processor's outputs for one conversation. ``options`` : of the processor."""
        return self.processor.apply_chat_template(
            [messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=options,
        )

    def prepare_flat(self, messages: Messages) -> dict[str, torch.Tensor]:
        """The same, with the images of the whole conversation in one flat list beside it."""
        return self.prepare_written(self.render(messages), _blocks(messages, "image"))

    def prepare_written(self, prompt: str, images: Any) -> dict[str, torch.Tensor]:
        """For a prompt with ``<image>`` in it. ``images`` : a flat list, or one for each prompt."""
        return self.processor(text=[prompt], images=images, return_tensors="pt")

    def run_media(self, messages: Messages, tokens: int, **options: Any) -> Media:
        """What becomes of each image and video, and so many greedy tokens."""
        return self.run_batch([messages], tokens, **options)[0]

    @torch.inference_mode()
    def run_batch(
        self, conversations: Sequence[Messages], tokens: int, **options: Any
    ) -> list[Media]:
        """The same for conversations that are padded on their left to one length."""
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left", **options},
        )
        mask = inputs["attention_mask"].bool()
        model = self.model.model
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # as generate counts them
        with _Capture(model) as seen:
            logits = self.model(**inputs, position_ids=positions).logits
        output = self.model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = [step.float().topk(2).values for step in output.logits]
        images = iter(zip(inputs.get("pixel_values", ()), seen.get("packed", ()), strict=True))
        sizes = iter(inputs.get("image_sizes", ()))
        videos = iter(inputs.get("pixel_values_videos", ()))
        results = []
        for row, messages in enumerate(conversations):
            pixels: dict[str, list[np.ndarray]] = {"image": [], "video": []}
            rows: dict[str, list[np.ndarray]] = {"image": [], "video": []}
            alone = len(_blocks(messages, "image")) == 1
            for _ in _blocks(messages, "image"):
                (tiles, features), size = next(images), next(sizes)
                pixels["image"].append(tiles[: _tiles(model.config, size) if alone else 1].numpy())
                rows["image"].append(features.numpy())
            for _ in _blocks(messages, "video"):
                video = next(videos)
                found = model.get_video_features(
                    video[None],
                    vision_feature_layer=model.config.vision_feature_layer,
                    vision_feature_select_strategy=model.config.vision_feature_select_strategy,
                )
                pixels["video"].append(video.numpy())
                rows["video"].append(found.pooler_output[0].numpy())
            generated = self._until_the_end(output.sequences[row, mask.shape[1] :].tolist())
            margins = [float(step[row, 0] - step[row, 1]) for step in best]
            results.append(
                Media(
                    ids=inputs["input_ids"][row, mask[row]].numpy(),
                    pixels=pixels,
                    rows=rows,
                    logits=logits[row, mask[row]].numpy(),
                    tokens=generated,
                    margins=margins[: len(generated)],
                )
            )
        return results

    def _until_the_end(self, tokens: list[int]) -> list[int]:
        """A row that has ended is padded for as long as another one goes on."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        return tokens[: last + 1]

    @torch.inference_mode()
    def run(
        self,
        messages: Messages,
        tokens: int = 0,
        inputs: dict[str, torch.Tensor] | None = None,
    ) -> Stages:
        """Every stage for one conversation, and so many greedy tokens.

        inputs : the processor's outputs, where they are not those of :meth:`prepare`.
        """
        inputs = self.prepare(messages) if inputs is None else inputs
        length = inputs["input_ids"].shape[1]
        with _Capture(self.model.model) as seen:
            logits = self.model(**inputs).logits[0]
        generated, margins = [], []
        if tokens:
            output = self.model.generate(
                **inputs,
                max_new_tokens=tokens,
                do_sample=False,
                use_cache=True,
                return_dict_in_generate=True,
                output_logits=True,
            )
            generated = output.sequences[0, length:].tolist()
            best = [step[0].float().topk(2).values for step in output.logits]
            margins = [float(first - second) for first, second in best]
        no_check = torch.zeros(0)
        return Stages(
            ids=inputs["input_ids"][0].numpy(),
            tiles=seen.get("tiles", no_check).numpy(),
            sizes=[(h, w) for h, w in inputs.get("image_sizes", no_check).tolist()],
            tower=seen.get("tower", no_check).numpy(),
            projected=seen.get("projected", no_check).numpy(),
            packed=[rows.numpy() for rows in seen.get("packed", [])],
            logits=logits.numpy(),
            tokens=generated,
            margins=margins,
        )


def _blocks(messages: Messages, kind: str) -> list[Any]:
    """The sources of the blocks of one kind, in order."""
    blocks = [block for message in messages for block in message["content"]]
    return [block[kind] for block in blocks if block["type"] == kind]


def _tiles(config: Any, size: torch.Tensor) -> int:
    """Tiles of an image that is alone in its conversation: those beyond are padding."""
    from transformers.models.llava_onevision.modeling_llava_onevision import (
        image_size_to_num_patches,
    )

    edge = config.vision_config.image_size
    return image_size_to_num_patches(size, config.image_grid_pinpoints, edge)


class _Capture:
    """Collects what goes in and out of the reference's vision stages while it is entered."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.seen: dict[str, Any] = {}

    def __enter__(self) -> dict[str, Any]:
        def tower(module: Any, args: Any, kwargs: Any) -> None:
            self.seen["tiles"] = args[0] if args else kwargs["pixel_values"]

        def projector(module: Any, args: Any, output: Any) -> None:
            self.seen["tower"], self.seen["projected"] = args[0], output

        pack = self.model.pack_image_features

        def packing(*args: Any, **kwargs: Any) -> Any:
            packed, lengths = pack(*args, **kwargs)
            self.seen["packed"] = packed
            return packed, lengths

        self.hooks = [
            self.model.vision_tower.register_forward_pre_hook(tower, with_kwargs=True),
            self.model.multi_modal_projector.register_forward_hook(projector),
        ]
        self.model.pack_image_features = packing
        return self.seen

    def __exit__(self, *_: object) -> None:
        del self.model.pack_image_features  # the class's own again
        for hook in self.hooks:
            hook.remove()
