"""What generation_config.json says, and what of it is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from changed_checkpoints import refusal
from checkpoints import write

from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.config.generation import GenerationDefaults
from mlx_onevision.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"eos_token_id": 7}, GenerationDefaults((7,))),
        ({"eos_token_id": [7, 9, 7]}, GenerationDefaults((7, 9))),
        ({}, GenerationDefaults()),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0},
            GenerationDefaults((), True, 0.7, 0.8, 20),
        ),
        (
            {"repetition_penalty": 1.05, "max_new_tokens": 64, "temperature": None},
            GenerationDefaults(repetition_penalty=1.05, max_new_tokens=64),
        ),
        (None, GenerationDefaults((2,))),  # from config.json, as there is no such file
    ],
)
def test_generation_defaults(
    tmp_path: Path, values: dict[str, Any] | None, expected: GenerationDefaults
) -> None:
    path = write(tmp_path) / "generation_config.json"
    path.unlink()
    if values is not None:
        path.write_text(json.dumps(values))
    assert load_checkpoint(tmp_path).generation_defaults == expected


@pytest.mark.parametrize(
    "values",
    [
        {"eos_token_id": "7"},
        {"eos_token_id": [True]},
        {"temperature": -1},
        {"temperature": "hot"},
        {"top_p": 1.5},
        {"top_k": -1},
        {"do_sample": "yes"},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
    ],
)
def test_generation_defaults_out_of_range(tmp_path: Path, values: dict[str, Any]) -> None:
    path = write(tmp_path) / "generation_config.json"
    path.write_text(json.dumps(values))
    assert next(iter(values)) in refusal(tmp_path, ConfigError)


def test_settings_that_are_not_done_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path) / "generation_config.json"
    path.write_text(json.dumps({"num_beams": 4, "min_length": 0}))
    load_checkpoint(tmp_path)
    assert caplog.messages == ["generation_config.json asks for num_beams, which is not done here."]
