"""The programs that are measured, each in a process of its own, and the inputs that all are given.

A process opens the checkpoint, says how long that took, and then answers each line of its standard
input, a job in JSON, with a line. A job names a row, and its seed makes the same images and words
in every process. No process gets a seed twice, so that nothing is answered from a cache.

Memory is the peak beyond what was held before, in bytes of the device's allocator.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

OURS = "mlx-onevision"
FRAMES = 32
UNUSED_SEED = 10**9  # of the answer that shows that a program is ready
TEXT_TOKENS = {"text-20": 20, "text-7400": 7400}
ROWS = {
    "text": tuple(TEXT_TOKENS),
    "image": ("image",),
    "images": ("images",),
    "video": ("video",),
    "second": ("second",),
    "batch": ("batch-1", "batch-8", "batch-16"),
}
"""The rows of the table that each name of ``--rows`` stands for."""
OURS_ONLY = ("second",)  # other programs keep nothing between requests that this could show

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What is asked: one prompt about media, or a batch of prompts."""

    texts: Sequence[str]
    images: Sequence[Image.Image] = ()
    frames: Sequence[Image.Image] = ()

    @cached_property
    def video(self) -> np.ndarray:
        """RGB frames (T, H, W, 3), of 8 bits."""
        return np.stack([np.asarray(frame) for frame in self.frames])

    @cached_property
    def messages(self) -> list[dict[str, Any]]:
        media: list[Any] = [{"type": "image", "image": image} for image in self.images]
        if self.frames:
            media.append({"type": "video", "video": self.video})
        return [{"role": "user", "content": [*media, {"type": "text", "text": self.texts[0]}]}]


def make_case(row: str, seed: int, words: int = 0) -> Case:
    """What a row asks, the same for the same seed.

    words : so many, in a row of text.
    """
    rng = np.random.default_rng(seed)

    def picture(height: int, width: int) -> Image.Image:
        coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    if row.startswith("text"):
        return Case([f"{seed:03}" + " more" * words])
    text = f"{seed:03} describe this in detail"
    if row.startswith("batch"):
        return Case([f"{seed:03} {n:02} describe this" for n in range(int(row.partition("-")[2]))])
    if row == "images":
        return Case([text], images=[picture(480, 640) for _ in range(8)])
    if row == "video":
        return Case([text], frames=[picture(480, 640) for _ in range(FRAMES)])
    return Case([text], images=[picture(1152, 1152)])


class Ours:
    """This package, through the library's own calls."""

    def __init__(self, folder: str, memory: str = "{}") -> None:
        import mlx.core as mx

        from mlx_onevision.api import load

        self.mx, self.version = mx, f"MLX {getattr(mx, '__version__', 0)}"
        self.model = load(os.path.abspath(folder), **json.loads(memory))

    def count(self, case: Case) -> Numbers:
        """What a case is made of; nothing is run."""
        inputs = self.model.prepare(case.messages)
        return {
            "prompt_tokens": len(inputs.input_ids),
            "media_tokens": sum(medium.tokens for medium in inputs.media),
            "tiles": sum(len(medium.tiles) for medium in inputs.media),
        }

    def answer(self, row: str, case: Case, tokens: int) -> Numbers:
        if row.startswith("batch"):
            return self._batch(case.texts, tokens)
        if row != "second":
            return self._ask(case.messages, tokens)[0]
        first, text = self._ask(case.messages, 8)
        reply = {"role": "assistant", "content": text or "-"}
        more = {"role": "user", "content": "and in more detail, please"}
        second, _ = self._ask([*case.messages, reply, more], tokens)
        return {**second, "first_turn": first["first"]}

    def _ask(self, messages: list[dict[str, Any]], tokens: int) -> tuple[Numbers, str]:
        before = self._reset()
        started = time.perf_counter()
        pieces: list[float] = []  # when each piece of text came
        stream = self.model.stream(messages=messages, max_tokens=tokens)
        for _ in stream:
            pieces.append(time.perf_counter())
        usage = stream.result().usage
        # A first token without text of its own shows only in what is left of the whole.
        first = min([*pieces[:1], time.perf_counter() - usage.decode_seconds]) - started
        numbers = {
            "first": first,
            "prepare": usage.prepare_seconds,
            "vision": usage.encode_seconds,
            "prefill": usage.prefill_seconds,
            "decode": usage.tokens_per_second,
            "memory": self.mx.get_peak_memory() - before,
            "kept": before,
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "answer_tokens": usage.completion_tokens,
        }
        return numbers, stream.result().text

    def _batch(self, texts: Sequence[str], tokens: int) -> Numbers:
        before, started = self._reset(), time.perf_counter()
        streams = self.model.stream(batch=list(texts), max_tokens=tokens)
        made = sum(stream.result().usage.completion_tokens for stream in streams)
        seconds = time.perf_counter() - started
        memory = self.mx.get_peak_memory() - before
        return {"decode": made / seconds, "memory": memory, "answer_tokens": made}

    def _reset(self) -> int:
        self.mx.reset_peak_memory()
        return self.mx.get_active_memory()


class MlxVlm:
    """mlx-vlm's processor and generate_step, which its commands run; for batches, batch_generate.

    It tiles each of several images. To be given as many tokens as the others, it is made to encode
    one tile of each, as the reference does.
    """

    def __init__(self, folder: str) -> None:
        self.mx: Any = import_module("mlx.core")
        package: Any = import_module("mlx_vlm")
        self.version = package.__version__
        self.model, self.processor = package.load(folder)
        self.steps: Any = import_module("mlx_vlm.generate.ar")
        self.wired: Any = import_module("mlx_vlm.generate.common").wired_limit
        self.module: Any = import_module("mlx_vlm.models.llava_onevision.llava_onevision")
        self.tiled = self.module.image_size_to_num_patches
        self.processor.tokenizer.stopping_criteria.eos_token_ids = []

    def answer(self, row: str, case: Case, tokens: int) -> Numbers:
        mx = self.mx
        mx.reset_peak_memory()
        before, started = mx.get_active_memory(), time.perf_counter()
        if row.startswith("batch"):
            texts = list(case.texts)
            done = self.steps.batch_generate(
                self.model, self.processor, prompts=texts, max_tokens=tokens
            )
            seconds, made = time.perf_counter() - started, done.stats.generation_tokens
            memory = mx.get_peak_memory() - before
            return {"decode": made / seconds, "memory": memory, "answer_tokens": made}
        inputs = self._prepare(case)
        prepared = time.perf_counter()
        ids, pixels = inputs.pop("input_ids"), inputs.pop("pixel_values", None)
        inputs.pop("attention_mask", None)
        with self.wired(self.model):
            steps = self.steps.generate_step(
                ids, self.model, pixels, None, max_tokens=tokens, temperature=0.0, **inputs
            )
            times: list[float] = []
            for token, _ in islice(steps, tokens):
                int(token)
                times.append(time.perf_counter())
        numbers = _timed(started, prepared, times)
        memory = mx.get_peak_memory() - before
        return {**numbers, "memory": memory, "kept": before, "prompt_tokens": ids.size}

    def _prepare(self, case: Case) -> dict[str, Any]:
        prompt = self.processor.tokenizer.apply_chat_template(
            case.messages, tokenize=False, add_generation_prompt=True
        )
        several = len(case.images) > 1
        self.module.image_size_to_num_patches = _one_tile if several else self.tiled
        if not several:
            videos = [list(case.frames)] if case.frames else None
            images = list(case.images) or None
            return dict(self.processor(text=[prompt], images=images, videos=videos))
        image = dict(self.processor.image_processor([list(case.images)], return_tensors="np"))
        token, rows = self.processor.image_token, self.processor.num_image_tokens + 1
        ids = self.processor.tokenizer(prompt.replace(token, token * rows))["input_ids"]
        return {
            "input_ids": self.mx.array(ids)[None],
            "pixel_values": self.mx.array(image["pixel_values"]),
            "image_sizes": self.mx.array(image["image_sizes"]),
        }


def _one_tile(*_: object) -> int:
    """In place of mlx-vlm's function for the tiles of an image of some size."""
    return 1


class Transformers:
    """transformers with PyTorch's scaled_dot_product_attention, on CUDA where there is one."""

    def __init__(self, folder: str) -> None:
        self.torch: Any = import_module("torch")
        transformers: Any = import_module("transformers")
        self.version = transformers.__version__
        self.device = "cuda" if self.torch.cuda.is_available() else "cpu"
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.model = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
            folder, dtype="auto", attn_implementation="sdpa"
        )
        self.model = self.model.to(self.device).eval()

    def answer(self, row: str, case: Case, tokens: int) -> Numbers:
        torch, cuda = self.torch, self.torch.cuda if self.device == "cuda" else None
        if cuda:
            cuda.synchronize()
            cuda.reset_peak_memory_stats()
        before, started = cuda.memory_allocated() if cuda else 0, time.perf_counter()
        inputs = self._prepare(case).to(self.device, self.model.dtype)
        if cuda:
            cuda.synchronize()
        prepared, times = time.perf_counter(), Times()
        # A streamer takes one sequence only.
        streamer = None if len(case.texts) > 1 else times
        bounds = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        with torch.inference_mode():
            ids = self.model.generate(**inputs, **bounds, streamer=streamer)
        if cuda:
            cuda.synchronize()
        seconds = time.perf_counter() - started
        memory = cuda.max_memory_allocated() - before if cuda else None
        prompt = inputs["input_ids"].shape[1]
        if row.startswith("batch"):
            made = len(case.texts) * (ids.shape[1] - prompt)
            return {"decode": made / seconds, "memory": memory, "answer_tokens": made}
        numbers = _timed(started, prepared, times.seen[1:])  # the prompt is handed over first
        return {**numbers, "memory": memory, "kept": before, "prompt_tokens": prompt}

    def _prepare(self, case: Case) -> Any:
        def prompt(messages: list[dict[str, Any]]) -> str:
            return self.processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )

        if len(case.texts) > 1:
            texts = [prompt(Case([text]).messages) for text in case.texts]
            return self.processor(
                text=texts, padding=True, padding_side="left", return_tensors="pt"
            )
        media: dict[str, Any] = {}
        if case.images:
            media["images"] = [list(case.images)]  # nested: several images are not tiled
        if case.frames:
            media["videos"] = [case.video]
        return self.processor(text=[prompt(case.messages)], return_tensors="pt", **media)


class Times:
    """A streamer for transformers that notes when each token came."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def put(self, _: Any) -> None:
        self.seen.append(time.perf_counter())

    def end(self) -> None:
        pass


def _timed(started: float, prepared: float, times: Sequence[float]) -> Numbers:
    spent = times[-1] - times[0]
    return {
        "first": times[0] - started,
        "prepare": prepared - started,
        "decode": (len(times) - 1) / spent if spent > 0 else 0.0,
        "answer_tokens": len(times),
    }


PROGRAMS: dict[str, tuple[Callable[..., Any], Sequence[str]]] = {
    OURS: (Ours, ()),
    "mlx-vlm": (MlxVlm, ("mlx_vlm",)),
    "transformers": (Transformers, ("transformers", "torch")),
}
"""How each is started, and the modules that it needs."""


def _replies(name: str, *given: str) -> Iterator[Numbers]:
    started = time.perf_counter()
    program = PROGRAMS[name][0](*given)
    load = time.perf_counter() - started
    program.answer("text-20", make_case("text-20", UNUSED_SEED), 2)  # weights may be read only now
    ready = time.perf_counter() - started
    yield {"load": load, "ready": ready, "version": program.version}
    for line in sys.stdin:
        job = json.loads(line)
        try:
            case = make_case(job["row"], job["seed"], job["words"])
            _ = case.messages  # made now, so that nobody's time is spent on it
            if job["tokens"]:
                yield program.answer(job["row"], case, job["tokens"])
            elif isinstance(program, Ours):
                yield program.count(case)
        except Exception as error:
            yield {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """The process: the name of a program, the checkpoint's folder, and what else that program takes
    as arguments.
    """
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    try:
        for reply in _replies(*sys.argv[1:]):
            print(json.dumps(reply), file=out, flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out, flush=True)


if __name__ == "__main__":
    main()
