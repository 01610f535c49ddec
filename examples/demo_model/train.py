"""Train the demo model.

    PYTHONPATH=. python -m examples.demo_model.train --out run --steps 15000

Writes to `--out`: log.txt as it goes, last.pt (to resume from: same command again) and best.pt (the
averaged weights that answered best so far on held-out, exactly cut drawings; `export.py` reads it).
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # each loader process has one core
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from examples.demo_model import learning
from examples.demo_model.layouts import make_layouts
from examples.demo_model.learning import DeviceLayouts, Head
from examples.demo_model.loading import Loader, to_device
from examples.demo_model.making import Makers, drawn_part, exact_part, told_part
from examples.demo_model.muon import Muon
from examples.demo_model.network import OneVision
from examples.demo_model.samples import GROUPS, LABELS
from examples.demo_model.sizes import Shape
from examples.demo_model.words import VOCABULARY, Words, build_tokenizer

# How much the questions of a label count in the loss, before balancing.
IMPORTANCE = {"colour": 1.5, "where": 1.5, "list": 1.5, "motion": 1.5, "which image": 1.0}
IMPORTANCE |= {"segment": 1.5, "second turn": 1.5, "third turn": 1.5, "fourth turn": 1.5}
IMPORTANCE |= {"title": 1.0, "summary": 1.5}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--steps", type=int, default=15_000, help="length of the schedule")
    add(
        "--seconds",
        type=float,
        help="choose the steps instead: as many as fit, by the pace of the first two fifths",
    )
    add("--stop-after", type=float, default=math.inf, help="end this call after so many seconds")
    add("--seed", type=int, default=0)
    add("--rate", type=float, default=3e-3)
    add("--workers", type=int, default=15)
    add("--images", type=int, default=1000, help="image sizes for each group of the drawn tiles")
    add("--log-every", type=int, default=100, help="steps")
    add("--judge-every", type=int, default=900, help="steps")
    add("--renew", type=int, default=4, help="steps for which exact tiles are used before new ones")
    add("--profile", action="store_true", help="log where the time of some early steps goes")
    add("--plain", action="store_true", help="do not compile")
    return parser.parse_args()


LEVEL = 0.4  # of the steps have the peak learning rate; until then their number may be open


def rate_at(step: int, steps: int) -> float:
    """Share of the peak learning rate: a short warm-up, level, then down to zero."""
    level = 1.0 if step < LEVEL * steps else (1 - step / steps) / (1 - LEVEL)
    return min(level, (step + 1) / 150)


class Run:
    """One training run: the state, a step, a judgement, the files."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.words = Words(build_tokenizer())
        layouts = make_layouts(args.seed, args.images)
        args.out.mkdir(parents=True, exist_ok=True)
        last = args.out / "last.pt"
        state = torch.load(last, map_location="cpu") if last.exists() else None
        first = state["step"] if state else 0
        makers = Makers(layouts, self.words, args.seed, args.workers, args.renew, first)
        self.loader = Loader(makers, args.seed, args.renew, first)
        held = Random(f"held out {args.seed}")
        self.held = [
            [exact_part(group, group.exact, self.words, held, 4) for group in GROUPS]
            for _ in range(1 if args.plain else 4)
        ]
        none = [drawn_part(group, 1, layouts, self.words, held, 4) for group in GROUPS]
        none.append(told_part(256, self.words, held))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.compiled = not args.plain
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("high")
        self.none = [to_device(part, self.device) for part in none]
        self.layouts = DeviceLayouts.of(layouts, self.device)
        self.prefix = torch.tensor(self.words.prefix, device=self.device)
        self.model = OneVision(Shape(VOCABULARY)).to(self.device)
        self.head = Head(self.model.shape.text).to(self.device)
        self.average = copy.deepcopy(self.model)
        self.both = torch.nn.ModuleList([self.model, self.head])
        self.optimiser = Muon(self.both)
        self.step_number, self.elapsed, self.best = 0, 0.0, 0.0
        self.weights = torch.tensor([IMPORTANCE.get(n, 0.7) for n in LABELS], device=self.device)
        self.error = torch.ones(len(LABELS), device=self.device)
        self.sums = torch.zeros(3, len(LABELS), device=self.device)
        self.steps: int | None = None if args.seconds else args.steps
        if state:
            self.restore(state)
            torch.manual_seed(args.seed + self.step_number)
        if self.compiled:
            for layer in self.model.vision_tower.vision_model.encoder.layers:
                layer.compile(dynamic=False)
            for layer in self.model.language_model.model.layers:
                layer.compile(dynamic=False)

    def autocast(self) -> torch.autocast:
        cuda = self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=cuda)

    def step(self) -> None:
        drawn, exact = self.loader.next()
        batch = learning.join(drawn, exact, self.layouts, self.compiled)
        text = batch.texts
        with self.autocast():
            loss, wrong, features = learning.forward(self.model, batch, self.prefix, self.compiled)
            seen = self.head(features, batch.kind, batch.colour)
        there = text["target"] >= 0
        totals = learning.by_label(loss, text["label"], there)
        tokens = learning.by_label(torch.ones_like(loss), text["label"], there)
        # Each label has its own mean; those that are often answered wrongly count for more.
        weight = self.weights * (0.25 + self.error)
        mean = (weight * totals / tokens.clamp(min=1)).sum() / weight.sum()
        (mean + max(0.05, 0.5 - self.step_number / 15_000) * seen).backward()
        torch.nn.utils.clip_grad_norm_(self.both.parameters(), 1.0)
        share = rate_at(self.step_number, self.steps or 10**9)
        self.optimiser.step(self.args.rate * share)
        self.step_number += 1
        keep = min(0.998, self.step_number / (self.step_number + 10))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.model.parameters()), 1 - keep
            )
            asked, right = learning.answers(wrong, text)
            error = torch.where(asked > 0, 1 - right / asked.clamp(min=1), self.error)
            self.error.lerp_(error, 0.02)
            self.sums += torch.stack([asked, right, totals / tokens.clamp(min=1)])
            self.seen = seen.detach()

    @torch.no_grad()
    def judge(self) -> dict[str, float]:
        """Share of held-out questions that the averaged weights answer right: exact tiles, text."""
        sums = torch.zeros(2, len(LABELS), device=self.device)
        for parts in self.held:
            exact = [to_device(part, self.device) for part in parts]
            batch = learning.join(self.none, exact, self.layouts, False)
            with self.autocast():
                _, wrong, _ = learning.forward(self.average, batch, self.prefix)
            keep = torch.cat(
                [
                    torch.arange(e + d, device=self.device) < e
                    for e, d in zip(batch.exact, batch.drawn, strict=True)
                ]
                + [torch.ones(len(batch.slots), device=self.device) > 0]
            )
            text = {name: value[keep] for name, value in batch.texts.items()}
            sums += torch.stack(learning.answers(wrong[keep], text))
        asked, right = sums.tolist()
        return {n: r / a for n, a, r in zip(LABELS, asked, right, strict=True) if a}

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "head": self.head.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "error": self.error,
            "step": self.step_number,
            "steps": self.steps,
            "elapsed": self.elapsed,
            "best": self.best,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.head.load_state_dict(state["head"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.error = state["error"].to(self.device)
        self.steps = state["steps"] if self.args.seconds else self.args.steps
        self.step_number, self.elapsed = state["step"], state["elapsed"]
        self.best = state["best"]
        self.log(f"resumed at step {self.step_number}, {self.elapsed:.0f} s")

    def log(self, line: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {line}"
        print(line, flush=True)
        with (self.args.out / "log.txt").open("a") as file:
            file.write(line + "\n")

    def report(self, seconds: float, steps: int) -> None:
        asked, right, loss = self.sums.tolist()
        self.sums.zero_()
        line = " ".join(
            f"{name}={r / a:.3f}/{value / steps:.3f}"
            for name, a, r, value in zip(LABELS, asked, right, loss, strict=True)
            if a
        )
        self.log(
            f"step {self.step_number} {self.elapsed:.0f}s {1000 * seconds / steps:.1f}ms/step "
            f"seen={self.seen.item():.3f} waited={self.loader.waited:.1f}s {line}"
        )

    def save(self) -> None:
        held = self.judge()
        mean = float(np.mean(list(held.values())))
        line = " ".join(f"{name}={value:.3f}" for name, value in held.items())
        self.log(f"held out: mean={mean:.4f} {line}")
        if mean >= self.best:
            self.best = mean
            best = {"model": self.average.state_dict(), "step": self.step_number, "held": held}
            _write(best, self.args.out / "best.pt")
        _write(self.state(), self.args.out / "last.pt")

    def train(self) -> None:
        self.log(f"parameters {sum(p.numel() for p in self.model.parameters())}")
        self.loader.start(self.device)
        begun = logged = time.time()
        before, logged_step, started = self.elapsed, self.step_number, self.elapsed
        first = self.step_number
        while True:
            self.elapsed = before + time.time() - begun
            if self.step_number == first + 300:
                started = self.elapsed
            elif not self.steps and self.step_number >= first + 500:
                self.choose_steps((self.elapsed - started) / (self.step_number - first - 300))
            done = self.step_number == self.steps or self.elapsed - before >= self.args.stop_after
            if self.step_number - logged_step >= self.args.log_every or (
                done and self.step_number > logged_step
            ):
                now = time.time()
                self.report(now - logged, self.step_number - logged_step)
                logged, logged_step = now, self.step_number
            if done or (self.step_number and self.step_number % self.args.judge_every == 0):
                self.save()
            if done:
                break
            if self.args.profile and self.step_number == 300:
                self.profile()
            else:
                self.step()
        self.loader.close()

    def choose_steps(self, pace: float) -> None:
        """Fix the length of the schedule at the end of its level part, from the seconds a step."""
        steps = self.step_number + round((self.args.seconds - self.elapsed) / pace)
        if self.step_number >= LEVEL * steps:
            self.steps = steps
            self.log(f"as many as fit into {self.args.seconds:.0f} s: --steps {steps}")

    def profile(self) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as profile:
            begun = time.time()
            for _ in range(5):
                self.step()
            issued = time.time() - begun
            torch.cuda.synchronize()
        self.log(f"5 steps: issued in {issued:.3f} s, done in {time.time() - begun:.3f} s")
        table = profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=28)
        (self.args.out / "profile.txt").write_text(table)


def _write(state: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


if __name__ == "__main__":
    Run(arguments()).train()
