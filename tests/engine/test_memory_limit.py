"""What does not fit into the memory is refused, before anything is computed."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from changed_checkpoints import edit, write_hollow
from checkpoints import Sizes, write
from click.testing import CliRunner

from examples.demo_model.cases import make_cases
from mlx_onevision.api import load
from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.checkpoint.plan import LazyTensorFiles
from mlx_onevision.checkpoint.recipes import uniform
from mlx_onevision.cli.main import cli
from mlx_onevision.engine import engine
from mlx_onevision.engine.jobs import prompt_logits
from mlx_onevision.engine.memory import ProcessLimit, cgroup_limits, working_set
from mlx_onevision.engine.pooling import prompt_vectors
from mlx_onevision.engine.prefix_cache import LEAST_MATCH
from mlx_onevision.engine.runner import Runner
from mlx_onevision.errors import (
    ConfigError,
    ContextOverflowError,
    OutOfMemoryError,
    RequestError,
)
from mlx_onevision.media.video import no_check
from mlx_onevision.network.memory_budget import MemoryModel
from mlx_onevision.network.memory_sizes import SMALLEST, RequestSize
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.plugins.adapters.engine import open_engine
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.requests import GenerateRequest
from mlx_onevision.plugins.hosts.http.command import serve as serve_command
from mlx_onevision.plugins.hosts.mcp.command import mcp
from mlx_onevision.prompt.processor import Inputs


def test_beyond_the_limit_is_refused_before_anything_is_computed(folder: Path) -> None:
    needed = Runner(load_checkpoint(folder)).memory
    limit = needed.request(RequestSize(200, 56), SMALLEST).total
    model = load(folder, memory_limit=limit / 1e9)
    photo = np.zeros((300, 500, 3), np.uint8)
    text = "one two three four " * 400
    refusal = r"a prompt of [\d,]+ tokens.* needs .* but the limit is .*; .* would fit"
    assert model.generate("hello", max_tokens=4).tokens
    mx.reset_peak_memory()
    with pytest.raises(OutOfMemoryError, match=refusal):
        model.generate(text)
    with pytest.raises(OutOfMemoryError, match=refusal):
        model.stream("hello", max_tokens=30_000)
    with pytest.raises(OutOfMemoryError, match=r"and 1 image"):
        model.generate(text, images=[photo])
    with pytest.raises(OutOfMemoryError, match=refusal):
        model.logits(model.prepare([{"role": "user", "content": text}]))
    with pytest.raises(OutOfMemoryError, match=refusal):
        model.embed([{"type": "text", "text": text}], "joint")
    answers = model.generate(batch=["hello", text, "there"], max_tokens=4)
    assert [answer.finish_reason for answer in answers] == ["length", "error", "length"]
    assert isinstance(answers[1].error, OutOfMemoryError)
    model.close()


@pytest.mark.parametrize("last", [1, None])
def test_logits_of_a_long_prompt_take_what_is_predicted(folder: Path, last: int | None) -> None:
    """Computed in chunks: at once, attention alone would take 2 heads * 3000**2 * 4 bytes."""
    subject = Runner(load_checkpoint(folder))
    inputs = Inputs(np.arange(3000, dtype=np.int32) % 200, (), "")
    others = mx.get_active_memory() - subject.memory.weights
    mx.reset_peak_memory()
    logits = prompt_logits(subject, no_check, inputs, last)
    measured = mx.get_peak_memory() - others
    if last is None:
        measured += logits.nbytes  # numpy's
    size = RequestSize(3000, 0)
    predicted = subject.memory.request(size, subject.model.budget, every=last is None)
    assert measured < 1.1 * predicted.total < 2 * 3000**2 * 4
    assert len(logits) == (last or 3000)


def test_a_limit_changes_no_answer(folder: Path) -> None:
    """Steps as small as they get, and nothing kept of the requests before."""
    photo = np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8)
    asked = [("hello", []), ("what is this", [photo]), ("one two " * 100, []), ("hello", [])]
    free, answers = load(folder), []
    for text, images in asked:
        answers.append(free.generate(text, images=images, max_tokens=8).tokens)
    arithmetic = free._engine.memory
    free.close()
    limit = arithmetic.request(RequestSize(650, 8), SMALLEST).total
    tight = load(folder, memory_limit=limit / 1e9)
    for (text, images), expected in zip(asked, answers, strict=True):
        assert tight.generate(text, images=images, max_tokens=8).tokens == expected
    together = tight.generate(batch=[text for text, images in asked if not images], max_tokens=8)
    assert [answer.tokens for answer in together] == [answers[n] for n in (0, 2, 3)]
    tight.close()


def test_a_model_beyond_the_limit_is_refused_when_it_is_loaded(folder: Path) -> None:
    with pytest.raises(OutOfMemoryError, match=r"the model needs .* for its weights, but the "):
        load(folder, memory_limit=1e-4)
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(RequestError, match="memory_limit must be"):
            load(folder, memory_limit=wrong)


def test_weights_are_not_read_to_be_quantized_for_a_limit_that_they_exceed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    take = LazyTensorFiles.take
    monkeypatch.setattr(
        LazyTensorFiles, "take", lambda files, tensor: taken.append("") or take(files, tensor)
    )
    with pytest.raises(OutOfMemoryError, match="for its weights, but the limit is"):
        load(folder, quantize=4, memory_limit=1e-4)
    assert not taken
    load(folder, quantize=4, memory_limit=0.1).close()
    assert taken


def test_what_fits_by_its_weights_alone_is_refused_before_they_are_read(folder: Path) -> None:
    """Weights that are quantized while they are read, without room for a request, or for the draft
    model's.
    """
    planned: list[MemoryModel] = []
    load_checkpoint(folder, recipe=uniform(4), admit=planned.append)
    draft = Runner(load_checkpoint(folder)).memory.weights
    weights, needed = planned[0].weights, planned[0].shortest.total
    load(folder, quantize=4, memory_limit=needed / 1e9).close()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with pytest.raises(OutOfMemoryError, match="for its weights, but"):
        load(folder, quantize=4, memory_limit=(weights + needed) / 2e9)
    with pytest.raises(OutOfMemoryError, match=r"and its draft model's, but .* leave its draft"):
        load(folder, quantize=4, memory_limit=(needed + draft / 2) / 1e9, draft_model=folder)
    assert mx.get_peak_memory() - before < draft / 20


@pytest.mark.parametrize(
    ("gigabytes", "limit", "found"),
    [
        (8, 5.9, r"13\.\d+ GB .* would need 5\.\d+ GB, so load it with quantize 4$"),
        (4, 2.8, r"13\.\d+ GB .* would need 5\.\d+ GB; use a smaller model$"),
        (64, 48, None),
    ],
)
def test_published_shapes_on_pretend_machines(
    tmp_path: Path, gigabytes: int, limit: float, found: str | None
) -> None:
    """The 7B model's language model; its weights are a hole in a file, and never read."""
    sizes = Sizes(hidden=3584, intermediate=18944, layers=28, heads=28, kv_heads=4, vocab=1024)
    large = write_hollow(tmp_path / "7b", sizes)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    if found is None:
        load(large, memory_limit=limit).close()
    else:
        with pytest.raises(OutOfMemoryError, match=found):
            load(large, memory_limit=limit)
    assert mx.get_peak_memory() - before < 1e6


def test_a_configuration_s_word_for_its_context_is_not_trusted(tmp_path: Path) -> None:
    """Nor for the length of an answer: both are no more than memory holds."""
    folder = write(tmp_path / "model", sizes=Sizes(layers=8, kv_heads=4))
    endless = {"max_new_tokens": 2**31 - 1, "eos_token_id": 383}
    edit(folder, "generation_config.json", **endless)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder, text_config={**text, "max_position_embeddings": 2**31 - 1})
    with pytest.raises(
        ConfigError, match=r"max_position_embeddings is 2147483647, not .* 16777216"
    ):
        load(folder)
    edit(folder, text_config={**text, "max_position_embeddings": 2**24})
    needed = Runner(load_checkpoint(folder)).memory
    limit = needed.shortest.total
    with load(folder, memory_limit=limit / 1e9) as model:
        longest = needed.longest(2**24, limit)
        assert longest < 1000
        usage = model.generate("hello", logit_bias={383: -100.0}).usage
        assert usage.prompt_tokens == 21 and 200 <= usage.completion_tokens < 1000
        with pytest.raises(OutOfMemoryError, match=r"an answer of \d+ max_tokens would fit"):
            model.generate("hello", max_tokens=2**20)
        clip = np.zeros((longest + 1, 28, 28, 3), np.uint8)
        with pytest.raises(ContextOverflowError, match=f"the context of {longest} has"):
            model.generate("what is this", videos=[clip])


def test_mlx_s_own_limit_is_that_of_the_models_that_are_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One a process; in whatever order they go."""
    monkeypatch.setattr(engine, "process_limit", ProcessLimit())  # others' models may be there
    default = mx.get_memory_limit()
    for order in ((0, 1), (1, 0)):
        models = [load(folder, memory_limit=limit) for limit in (0.3, 0.2)]
        assert mx.get_memory_limit() == int(0.5e9)
        with load(folder):  # has no limit of its own
            assert mx.get_memory_limit() == default
        assert mx.get_memory_limit() == int(0.5e9)
        models[order[0]].close()
        assert mx.get_memory_limit() == int((0.3, 0.2)[order[1]] * 1e9)
        models[order[1]].close()
        assert mx.get_memory_limit() == default
    with load(folder, memory_limit=0.3, draft_model=folder):
        assert mx.get_memory_limit() == int(0.3e9)
    assert mx.get_memory_limit() == default


def test_fewer_logits_than_none_are_refused(folder: Path) -> None:
    with load(folder) as model:
        inputs = model.prepare([{"role": "user", "content": "hello"}])
        assert len(model.logits(inputs, last=0)) == 0
        for last in (-1, -1000):
            with pytest.raises(RequestError, match=f"last must be .*, not {last}"):
                model.logits(inputs, last=last)


def test_joint_embeddings_take_the_steps_that_are_planned(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Runner(load_checkpoint(folder))
    subject.model.budget = replace(subject.model.budget, chunk=2048)
    subject.chunk = 256
    steps, hidden_states = list[int](), OneVision.hidden_states

    def watched(model: OneVision, h: mx.array, *rest: Any, **options: Any) -> mx.array:
        steps.append(h.shape[0] * h.shape[1])
        return hidden_states(model, h, *rest, **options)

    monkeypatch.setattr(OneVision, "hidden_states", watched)
    prompts = [Inputs(np.arange(n, dtype=np.int32) % 200, (), "") for n in (600, 100, 120, 90)]
    assert len(prompt_vectors(subject, prompts, no_check)) == 4
    assert steps == [256, 256, 88, 240, 90]


def test_joint_embeddings_need_no_transformers(folder: Path) -> None:
    """Which importing mlx-lm by itself imports. More than one chunk has a KV cache."""
    code = (
        "import sys\nfrom mlx_onevision.api import load\n"
        f"model = load({str(folder)!r})\n"
        "model.embed([{'type': 'text', 'text': 'one two ' * 2000}], 'joint')\n"
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_control_groups_limit_what_may_be_used(tmp_path: Path) -> None:
    def group(path: str, name: str, value: str) -> None:
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        (tmp_path / path / name).write_text(f"{value}\n")

    def found(groups: str) -> list[int]:
        return sorted(set(cgroup_limits(groups, tmp_path)))

    group("user.slice/job", "memory.max", "3000")
    group("user.slice", "memory.max", "max")
    group("", "memory.max", "9000")
    group("memory/docker/box", "memory.limit_in_bytes", "5000")
    group("memory", "memory.limit_in_bytes", "9223372036854771712")
    assert found("0::/user.slice/job\n") == [3000, 9000]
    assert found("0::/not/here\n") == [9000]  # the path outside of a container
    assert found("8:cpu,cpuacct:/x\n4:memory:/docker/box\n0::/\n")[0] == 5000
    assert found("8:cpu,cpuacct:/x\n") == []
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < working_set() <= 7 / 8 * machine


def test_every_command_that_loads_a_model_has_the_options() -> None:
    own = [cli.load(name) for name in ("generate", "chat", "describe", "embed", "bench")]
    for command in (*own, serve_command, mcp):
        options = {option for param in command.params for option in param.opts}
        assert {"--memory-limit", "--kv-bits", "--visual-tokens"} <= options


def test_a_command_and_a_backend_keep_to_the_limit() -> None:
    long = ["--prompt", "hello", "--max-tokens", "3000"]
    done = CliRunner().invoke(cli, ["generate", "--memory-limit", "0.0001", *long])
    assert isinstance(done.exception, OutOfMemoryError) or done.exit_code == 1
    assert CliRunner().invoke(cli, ["generate", "--memory-limit", "0", *long]).exit_code == 2
    with open_engine("demo", memory_limit=0.0001) as backend:
        with pytest.raises(PluginError, match=r"the limit is 0\.10 MB") as raised:
            backend.generate(GenerateRequest.ask("hello")).result()
        assert raised.value.code == "out_of_memory" and "smaller model" in raised.value.hint
    with open_engine("demo", memory_limit=0.0072, kv_bits=8) as backend:
        assert backend.generate(GenerateRequest.ask("hello", max_tokens=2)).result().text
        with pytest.raises(PluginError, match=r"the limit is 7\.20 MB") as raised:
            backend.generate(GenerateRequest.ask("hello", max_tokens=3000)).result()
        assert raised.value.code == "too_large" and "would fit" in raised.value.hint


# Quantized keys and values.


def questions() -> list[tuple[str, list[np.ndarray]]]:
    found = []
    for case in [*islice(make_cases("pictures", 6), 6), *islice(make_cases("several", 2), 2)]:
        question = next(q for q in case.questions if not q.history)
        found.append((question.text, [np.asarray(drawing) for drawing in case.draw()]))
    return found


def test_eight_bits_answer_as_full_precision() -> None:
    full, quantized = load("demo", dtype="float32"), load("demo", dtype="float32", kv_bits=8)
    for text, drawings in questions():
        expected = full.generate(text, images=drawings, max_tokens=32)
        assert quantized.generate(text, images=drawings, max_tokens=32).text == expected.text
        again = quantized.generate(text, images=drawings, max_tokens=32)  # from the prefix cache
        assert again.text == expected.text
        assert (again.usage.cached_tokens > 0) == (again.usage.prompt_tokens > LEAST_MATCH)
    batch = [[{"role": "user", "content": text}] for text in ("hello", "what is red")]
    together = quantized.generate(batch=batch, max_tokens=16)  # one after another
    alone = [quantized.generate(messages=row, max_tokens=16) for row in batch]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    full.close()
    quantized.close()


def test_what_cannot_be_quantized_is_refused(folder: Path) -> None:
    with pytest.raises(RequestError, match="kv_bits is 3; keys and values take 8 or 4 bits"):
        load(folder, kv_bits=3)
    with pytest.raises(RequestError, match="heads are 16 wide"):
        load(folder, kv_bits=8)
