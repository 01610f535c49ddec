"""Adapters that PEFT has written, against PEFT on transformers: every stage and greedy tokens."""

# pyright: reportMissingImports=false
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.cases import ask, footage, picture, said
from parity.checkpoints import Tiny
from parity.compare import assert_same, assert_same_media, assert_same_tokens
from parity.oracle import Oracle
from parity.ours import Ours
from parity.pairs import Checkpoints

from peft import LoraConfig, get_peft_model  # isort: skip  (after torchvision's stand-in)

TOKENS = 32
CONVERSATIONS = {
    "text": ask(text="How many words are in this sentence?"),
    "image": ask(picture((337, 511))),
    "images": ask(picture((333, 334)), picture((61, 241)), text="Which is it?"),
}
VIDEO = [said("user", footage(4, (40, 56)), "What happens?")]
LANGUAGE = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"

ADAPTERS: dict[str, dict[str, Any]] = {
    "language model": {"target_modules": LANGUAGE, "r": 4, "lora_alpha": 8},
    "all, ranks and alphas by pattern": {
        "target_modules": r".*\.([qkv]_proj|out_proj|fc[12]|linear_[12]|down_proj)",
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"q_proj": 2, r".*layers\.1\..*fc1": 3},
        "alpha_pattern": {"v_proj": 3},
        "use_rslora": True,
    },
    "DoRA": {
        "target_modules": r".*\.(q_proj|v_proj|o_proj|out_proj|fc1|linear_1|up_proj)",
        "r": 3,
        "lora_alpha": 6,
        "use_dora": True,
    },
    "projector, head and embedding trained whole": {
        "target_modules": ["q_proj", "v_proj"],
        "r": 4,
        "modules_to_save": ["multi_modal_projector", "lm_head", "embed_tokens"],
    },
    "embedding": {"target_modules": ["embed_tokens", "v_proj"], "r": 4, "lora_alpha": 8},
}


CASES = [
    *((name, False) for name in ADAPTERS),
    ("embedding", True),
    ("projector, head and embedding trained whole", True),
]


@pytest.fixture(
    scope="module", params=CASES, ids=[f"{name}{', tied' * tied}" for name, tied in CASES]
)
def pair(
    request: pytest.FixtureRequest, checkpoints: Checkpoints, tmp_path_factory: Any
) -> Iterator[tuple[Ours, Oracle]]:
    name, tied = request.param
    folder = checkpoints.hub(Tiny(tied=tied))
    oracle = Oracle(folder)
    adapter = save_adapter(oracle, ADAPTERS[name], tmp_path_factory.mktemp("adapter"))
    ours = Ours(folder, adapter=adapter)
    yield ours, oracle
    ours.close()


def save_adapter(oracle: Oracle, settings: dict[str, Any], folder: Path) -> Path:
    """Puts a random adapter on the oracle's model, in its place, and saves it."""
    torch.manual_seed(3)
    adapted = get_peft_model(oracle.model, LoraConfig(bias="none", **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "modules_to_save" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    adapted.eval()
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_stages_and_tokens(pair: tuple[Ours, Oracle], kind: str) -> None:
    ours, oracle = pair
    assert_same(ours, oracle, CONVERSATIONS[kind], tokens=TOKENS)


def test_video(pair: tuple[Ours, Oracle]) -> None:
    ours, oracle = pair
    theirs = oracle.run_media(VIDEO, TOKENS)
    assert_same_media(ours, theirs, VIDEO)
    assert_same_tokens(ours.tokens(VIDEO, TOKENS), theirs)
