"""One step of training, LoRA and full, against torch: gradients and updated weights."""

# pyright: reportMissingImports=false
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten, tree_unflatten
from parity.cases import footage, picture, said
from parity.checkpoints import Tiny
from parity.oracle import Oracle
from parity.pairs import Checkpoints

from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.checkpoint.tensors import canonical_name
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.prompt.processor import Processor
from mlx_onevision.train.data import Example, Rows
from mlx_onevision.train.features import encode
from mlx_onevision.train.loop import Settings, optimiser
from mlx_onevision.train.parts import PARTS, Part, Trained, set_up
from mlx_onevision.train.step import Batch, loss_and_gradients

from peft import LoraConfig, get_peft_model  # isort: skip  (after torchvision's stand-in)

RATE = 1e-2
LINEAR = r".*\.([qkvo]_proj|out_proj|gate_proj|up_proj|down_proj|fc[12]|linear_[12])"
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "A cat and two dogs."}]}
CONVERSATIONS = [
    [said("user", picture((333, 334)), "What is in this image?"), ANSWER],
    [
        said("user", picture((61, 241)), picture((40, 56)), picture((9, 9)), "Which is it?"),
        {"role": "assistant", "content": [{"type": "text", "text": "The second."}]},
        said("user", "Why?"),
        ANSWER,
    ],
    [said("user", footage(4, (40, 56)), "What happens?"), ANSWER],
]


def rows(folder: Path) -> tuple[Rows, list[Example]]:
    config = load_checkpoint(folder).config
    reader = Rows(Processor.from_folder(folder, config), {}, 4096)
    return reader, [reader.example("row", c) for c in CONVERSATIONS]


def ours(
    model: OneVision, reader: Rows, examples: list[Example], tower: bool
) -> tuple[float, Mapping[str, Any]]:
    """Two batches of a step: one of two rows, padded, and one of one."""
    media = [reader.prepare(example).media for example in examples]
    given: list[Any] = media if tower else [[encode(model, m) for m in found] for found in media]
    batches = [Batch(examples[:2], given[:2]), Batch(examples[2:], given[2:])]
    return loss_and_gradients(model, batches)


def reference_loss(oracle: Oracle, reader: Rows, examples: list[Example]) -> torch.Tensor:
    """The mean over all tokens with loss, a row at a time; the reference's pixels are ours."""
    total = torch.tensor(0.0)
    for example, messages in zip(examples, CONVERSATIONS, strict=True):
        inputs = oracle.prepare(messages[:-1])
        ids = torch.tensor(example.ids, dtype=torch.long)[None]
        del inputs["attention_mask"]
        length = inputs.pop("input_ids").shape[1]
        assert len(example.ids) > length
        logits = oracle.model(input_ids=ids, **inputs).logits[0]
        (places,) = np.nonzero(example.learned)
        scores = torch.log_softmax(logits[places - 1], dim=-1)
        total = total - scores[torch.arange(len(places)), ids[0, places]].sum()
    return total / sum(example.tokens for example in examples)


def assert_close(name: str, found: Any, wanted: torch.Tensor) -> None:
    array = np.array(found)
    expected = wanted.detach().numpy()
    if array.ndim == 4:
        array = array.transpose(0, 3, 1, 2)
    assert array.shape == expected.shape, name
    assert np.abs(array - expected).max() < 1e-5, name


@pytest.mark.parametrize("parts", [("language",), PARTS], ids=["language", "all parts"])
def test_a_step_of_low_rank_terms(checkpoints: Checkpoints, parts: tuple[Part, ...]) -> None:
    folder = checkpoints.hub(Tiny())
    reader, examples = rows(folder)
    trained = Trained(parts=parts, rank=4, scale=2.0)
    model = load_checkpoint(folder, fused=False).model
    set_up(model, trained, seed=0)
    oracle = Oracle(folder)
    targets = LINEAR if len(parts) > 1 else r".*language_model.*\.[a-z]+_proj"
    get_peft_model(oracle.model, LoraConfig(target_modules=targets, r=4, lora_alpha=8))
    theirs = low_rank(oracle)
    # Other values than zeros, or the first factors would have no gradients.
    mx.random.seed(1)
    leaves: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    drawn = {n: 0.1 * mx.random.normal(leaf.shape) for n, leaf in leaves.items()}
    model.load_weights(list(drawn.items()), strict=False)
    assert theirs.keys() == leaves.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(torch.tensor(np.array(drawn[name].T)))
    check_step(model, reader, examples, oracle, theirs, "tower" in parts, transposed=True)


def low_rank(oracle: Oracle) -> dict[str, Any]:
    found = {}
    for name, parameter in oracle.model.named_parameters():
        if "lora_" in name:
            module, factor = name.removesuffix(".default.weight").rsplit(".", 1)
            path = canonical_name(module)
            if path is not None and canonical_name(f"{module}.weight") is not None:
                found[f"{path}.{factor.lower()}"] = parameter
    return found


def test_a_full_step(checkpoints: Checkpoints) -> None:
    folder = checkpoints.hub(Tiny(tied=True))
    reader, examples = rows(folder)
    model = load_checkpoint(folder, fused=False).model
    set_up(model, Trained("full", PARTS), seed=0)
    oracle = Oracle(folder)
    theirs = {}
    for name, parameter in oracle.model.named_parameters():
        canonical = canonical_name(name)
        if canonical is not None:
            theirs[canonical] = parameter
    check_step(model, reader, examples, oracle, theirs, tower=True)


def check_step(
    model: OneVision,
    reader: Rows,
    examples: list[Example],
    oracle: Oracle,
    theirs: Mapping[str, Any],
    tower: bool,
    transposed: bool = False,
) -> None:
    update = torch.optim.AdamW(theirs.values(), lr=RATE, weight_decay=0.1)
    expected = reference_loss(oracle, reader, examples)
    expected.backward()
    loss, gradients = ours(model, reader, examples, tower)
    assert abs(loss - expected.item()) < 1e-5
    flat: dict[str, mx.array] = dict(tree_flatten(gradients))
    assert flat.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert_close(name, flat[name].T if transposed else flat[name], parameter.grad)
    # AdamW divides by the gradients' own size, so that those which are 0 but for rounding would
    # move a weight by the whole learning rate, either way.
    with torch.no_grad():
        for name, parameter in theirs.items():
            small = parameter.grad.abs() < 1e-5
            parameter.grad[small] = 0
            at = small.numpy()
            if at.ndim == 4:
                at = at.transpose(0, 2, 3, 1)
            flat[name] = mx.where(mx.array(at.T if transposed else at), 0.0, flat[name])
    settings = Settings(learning_rate=RATE, schedule="constant", weight_decay=0.1)
    ours_update = optimiser(settings)
    ours_update.update(model, tree_unflatten(list(flat.items())))
    update.step()
    leaves: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    for name, parameter in theirs.items():
        assert_close(name, leaves[name].T if transposed else leaves[name], parameter)
