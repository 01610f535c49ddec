# pyright: reportUnknownMemberType=false
"""A benchmark's run: limits of the machine first, then every program in turn on the same inputs.

The limit of a first token is the time of its multiplications at the measured matrix rate, or of
reading the weights once at the measured bandwidth, whichever is longer. The limit of decode is the
bandwidth over the bytes that one token needs: weights, keys and values.
"""

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_onevision.bench.checkpoint import environment
from mlx_onevision.bench.programs import (
    OURS,
    OURS_ONLY,
    PROGRAMS,
    ROWS,
    TEXT_TOKENS,
    Numbers,
)
from mlx_onevision.bench.report import ratios, summary
from mlx_onevision.checkpoint.tensors import read_weights
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.errors import OneVisionError, RequestError
from mlx_onevision.files import read_json

LONG_ENOUGH = 0.1  # seconds of one measurement
MOST_COPIED, MOST_MULTIPLIED = 1 << 30, 8192  # values; rows and columns
SPARE = 64  # tokens between the longest text and the context's end


def require(programs: Sequence[str]) -> None:
    """RequestError naming the first of them that is not installed."""
    for name in programs:
        for module in PROGRAMS[name][1]:
            if importlib.util.find_spec(module) is None:
                needed = module.replace("_", "-")
                raise RequestError(
                    f"{name} cannot be measured because {needed} is not installed here; "
                    f"pip install {needed}, or leave {name} out of --versus"
                )


class Child:
    """A program in a process of its own, which :meth:`close` ends."""

    def __init__(self, name: str, folder: Path, memory: Mapping[str, Any]) -> None:
        own = [json.dumps(memory)] if name == OURS else []
        self._process = subprocess.Popen(  # noqa: S603 (this interpreter, this package)
            [sys.executable, "-m", "mlx_onevision.bench.programs", name, str(folder), *own],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(),
            start_new_session=True,  # Ctrl-C is this process's business
        )
        self.name, self._folder = name, str(folder)
        try:
            self.opened = self._read()
        except BaseException:
            self.close()
            raise

    def ask(self, row: str, seed: int, tokens: int, words: int = 0) -> Numbers:
        """Its reply, or {"error": a sentence}. No ``tokens``: what the case is made of."""
        job = {"row": row, "seed": seed, "tokens": tokens, "words": words}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended, as reading will tell
        return self._read()

    def _read(self) -> Numbers:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            return {"error": f"its process has ended with code {self._process.wait()}"}
        reply = json.loads(line)
        if "error" in reply:
            text = " ".join(reply["error"].split()).replace(self._folder, "the model's folder")
            reply["error"] = text[:300]
        return reply

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def measure_limits(dtype: mx.Dtype) -> dict[str, float]:
    """What this machine does through MLX: bytes a second, read and written in a copy, and additions
    and multiplications a second in a matrix product of ``dtype``.
    """

    def seconds(function: Callable[[], mx.array]) -> float:
        times: list[float] = []
        for _ in range(4):
            started = time.perf_counter()
            mx.eval(function())
            times.append(time.perf_counter() - started)
        return min(times)

    values, rate = 1 << 22, 0.0
    while True:
        array = mx.zeros(values, mx.bfloat16)
        mx.eval(array)
        took = seconds(lambda array=array: array + 1)
        rate = max(rate, 4 * values / took)
        if took > LONG_ENOUGH or values >= MOST_COPIED:
            break
        values *= 4
    del array
    side, product = 256, 0.0
    while True:
        matrix = mx.random.normal((side, side)).astype(dtype)
        mx.eval(matrix)
        took = seconds(lambda matrix=matrix: matrix @ matrix)
        product = max(product, 2 * side**3 / took)
        if took > LONG_ENOUGH or side >= MOST_MULTIPLIED:
            break
        side *= 2
    del matrix
    mx.clear_cache()
    return {"copy_bytes_per_second": rate, "matrix_operations_per_second": product}


class Costs:
    """What an answer costs at least, from the shapes in config.json and the files' tensors."""

    def __init__(self, folder: Path) -> None:
        self.config = OneVisionConfig.from_dict(read_json(folder / "config.json") or {})
        tensors = read_weights(folder)
        tied = not any(name.startswith("lm_head") for name in tensors)
        parts = {"language_model.": 0, "lm_head": 0, "": 0}
        for name, tensor in tensors.items():
            if tied or not name.startswith("language_model.embed_tokens"):
                part = next(part for part in parts if name.startswith(part))
                parts[part] += tensor.stop - tensor.start
        self.step_bytes = parts["language_model."] + parts["lm_head"]
        """Weights that each token is multiplied with: all of the language model but a lookup."""
        types = [t.dtype for t in tensors.values() if t.dtype in ("BF16", "F16", "F32")]
        common = max(types or ["BF16"], key=types.count)
        self.dtype = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}[common]

    def operations(self, tiles: int, prompt: int, cached: int = 0) -> float:
        """Of all matrix products up to the first token, causal attention counted once."""
        vision, text = self.config.vision_config, self.config.text_config
        patches, width, hidden = self.config.tokens_per_tile, vision.hidden_size, text.hidden_size
        layers = max(self.config.feature_layers)
        block = 4 * width * width + 2 * width * vision.intermediate_size + 2 * patches * width
        around = 3 * vision.patch_size**2 * width + hidden * (width + hidden)
        tower = tiles * patches * (layers * block + around)
        queries = text.num_attention_heads * text.head_dim
        keys = text.num_key_value_heads * text.head_dim
        linear = 2 * hidden * (queries + keys) + 3 * hidden * text.intermediate_size
        new = prompt - cached
        attended = new * cached + new * (new + 1) / 2
        language = text.num_hidden_layers * (new * linear + 2 * queries * attended)
        return 2.0 * (tower + language + hidden * text.vocab_size)

    def decode_bytes(self, positions: int) -> float:
        """That one token needs after so many others."""
        text = self.config.text_config
        keys = text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        return self.step_bytes + 2.0 * keys * positions * self.dtype.size

    def limits(
        self, machine: dict[str, float], about: Numbers, cached: int, tokens: int
    ) -> dict[str, float]:
        """Of a row: seconds up to the first token, tokens a second after it."""
        prompt, copied = about["prompt_tokens"], machine["copy_bytes_per_second"]
        operations = self.operations(0 if cached else about["tiles"], prompt, cached)
        return {
            "first": max(
                operations / machine["matrix_operations_per_second"], self.step_bytes / copied
            ),
            "decode": copied / self.decode_bytes(prompt + tokens // 2),
        }


def measure(
    folder: Path,
    rows: Sequence[str],
    versus: Sequence[str],
    *,
    runs: int,
    tokens: int,
    say: Callable[[str], None],
    memory: Mapping[str, Any],
) -> dict[str, Any]:
    """The numbers of a whole benchmark, for JSON; see docs/benchmark.md. ``memory`` : arguments of
    :func:`mlx_onevision.load` for this program.

    Raises:
        OneVisionError: where a program cannot open the model. Where one cannot answer, "error"
            stands in place of the row's numbers; see :func:`failed`.
    """
    say("copy bandwidth and matrix rate")
    costs = Costs(folder)
    machine = measure_limits(costs.dtype)
    with ExitStack() as ending:
        children: list[Child] = []
        for name in (OURS, *versus):
            say(f"{name}: loading")
            child = Child(name, folder, memory)
            ending.callback(child.close)
            if "error" in child.opened:
                raise OneVisionError(f"{name} cannot open the model: {child.opened['error']}")
            children.append(child)
        seeds = iter(range(10**9))
        table: list[dict[str, Any]] = []
        for row in (row for name in rows for row in ROWS[name]):
            entry = _measure_row(row, children, seeds, costs, machine, runs, tokens, say)
            table.append(entry)
    return {
        "device": str(mx.device_info().get("device_name", mx.default_device().type.name)),
        "dtype": str(costs.dtype).removeprefix("mlx.core."),
        "runs": runs,
        "answer_tokens": tokens,
        "limits": machine,
        "programs": {child.name: child.opened for child in children},
        "rows": table,
    }


def failed(numbers: Mapping[str, Any]) -> list[str]:
    """The rows of a benchmark that this program could not answer."""
    return [row["row"] for row in numbers["rows"] if "error" in row["results"][OURS]]


def _measure_row(
    row: str,
    children: Sequence[Child],
    seeds: Iterator[int],
    costs: Costs,
    machine: dict[str, float],
    runs: int,
    tokens: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    words, ours = 0, children[0]
    if row in TEXT_TOKENS:
        most = costs.config.text_config.max_position_embeddings - tokens - SPARE
        words = _words(ours, min(TEXT_TOKENS[row], most))
    asked = [child for child in children if child is ours or row not in OURS_ONLY]
    taken: dict[str, list[Numbers]] = {child.name: [] for child in asked}
    failed: dict[str, str] = {}
    for run in range(runs + 1):  # the first is a warm-up, and not counted
        seed = next(seeds)
        for child in asked:
            if child.name in failed:
                continue
            say(f"{row}: {child.name}, {f'run {run} of {runs}' if run else 'warming up'}")
            reply = child.ask(row, seed, tokens, words)
            due = tokens * int(row.removeprefix("batch-") if row.startswith("batch") else 1)
            if reply.get("answer_tokens", due) != due:
                reply = {"error": f"it made {reply['answer_tokens']} tokens instead of {due}"}
            if "error" in reply:
                failed[child.name] = reply["error"]
            elif run:
                taken[child.name].append(reply)
    entry: dict[str, Any] = {"row": row}
    if not row.startswith("batch"):
        about = ours.ask(row, next(seeds), 0, words)
        if "error" not in about and taken[OURS]:
            about["prompt_tokens"] = taken[OURS][-1]["prompt_tokens"]
            cached = taken[OURS][-1]["cached_tokens"]
            entry |= about | {"limit": costs.limits(machine, about, cached, tokens)}
    entry["results"] = {
        name: {"error": failed[name]} if name in failed else summary(numbers)
        for name, numbers in taken.items()
    }
    entry["ratios"] = {
        name: ratios(entry["results"][OURS], result)
        for name, result in entry["results"].items()
        if name != OURS
    }
    return entry


def _words(ours: Child, wanted: int) -> int:
    """How many words make a prompt of about so many tokens."""
    none, hundred = (ours.ask("text-20", 0, 0, words) for words in (0, 100))
    if "error" in none or "error" in hundred:
        return wanted
    each = (hundred["prompt_tokens"] - none["prompt_tokens"]) / 100
    return max(0, round((wanted - none["prompt_tokens"]) / each))
