"""How often the demo model is right, by kind of question: files in, text out, right to the letter.

    PYTHONPATH=. python -m examples.demo_model.evaluate --out run/evaluation

Pictures go to the model as PNG and JPEG files through `mlx_onevision.load`, and its answer must be
the one right sentence. A video goes in as cut frames, and counts as right when each token of the
right sentence is the likeliest next one; a video is a file like a picture. Writes results.json and,
for wrong answers, mistakes.png; sets that results.json has from the same settings are kept.
With `--through transformers` (needs torch, torchvision) transformers answers from the same files.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from examples.demo_model.cases import KINDS, SETS, Case, PromptRequest, make_cases
from examples.demo_model.sheet import Mistake, contact_sheet

SETTINGS = ("model", "through", "dtype", "seed", "count", "visual_tokens")


class Answerer(Protocol):
    """Something that looks at files and answers questions about them."""

    def look(self, paths: list[Path], video: bool) -> None: ...

    def answer(self, question: PromptRequest) -> str: ...


def judge(answerer: Answerer, cases: list[Case], said: Callable[[str], None]) -> dict[str, Any]:
    """Questions asked and answered right, by kind, and the mistakes."""
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    mistakes: list[Mistake] = []
    begun = time.time()
    for number, case in enumerate(cases, 1):
        with tempfile.TemporaryDirectory() as folder:
            answerer.look(case.write(Path(folder)), case.medium.video)
            for question in case.questions:
                answer = answerer.answer(question)
                asked[question.kind] += 1
                right[question.kind] += answer == question.answer
                if answer != question.answer:
                    mistakes.append(Mistake(case, question, answer))
        if number % 100 == 0:
            wrong = sum(asked.values()) - sum(right.values())
            said(f"{number} of {len(cases)} drawings, {wrong} wrong, {time.time() - begun:.0f} s")
    return {
        "drawings": len(cases),
        "kinds": {kind: [right[kind], asked[kind]] for kind in asked},
        "mistakes": mistakes,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Right answers of each kind (rows) in each set (columns), as Markdown."""
    rows = list(dict.fromkeys(kind for name in results for kind in KINDS[name]))
    lines = [f"| | {' | '.join(results)} |", f"|---|{'---|' * len(results)}"]
    for kind in rows:
        cells = []
        for result in results.values():
            right, asked = result["kinds"].get(kind, (0, 0))
            cells.append(f"{100 * right / asked:.1f} % of {asked}" if asked else "")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def earlier(path: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sets that were judged with the same settings before."""
    if not path.exists():
        return {}
    report = json.loads(path.read_text())
    return report["sets"] if settings.items() <= report.items() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--model", default="demo", help="what mlx_onevision.load takes, or a folder")
    add("--count", type=int, default=500, help="questions of each kind")
    add("--sets", nargs="+", choices=SETS, default=list(SETS))
    add("--seed", type=int, default=0)
    add("--dtype", help="compute in this type instead of the checkpoint's")
    add("--visual-tokens", type=float, default=1.0, help="as mlx_onevision.load takes it")
    add("--through", choices=("mlx", "transformers"), default="mlx")
    args = parser.parse_args()
    answerer: Answerer
    if args.through == "mlx":
        from examples.demo_model.answering import Package

        answerer = Package(args.model, args.dtype, args.visual_tokens)
    else:
        from examples.demo_model.answering_reference import Reference

        answerer = Reference(args.model, args.dtype)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in SETTINGS}
    results = earlier(args.out / "results.json", settings)
    mistakes: list[Mistake] = []
    for name in args.sets:
        print(name, flush=True)
        cases = list(make_cases(name, args.count, args.seed))
        results[name] = judge(answerer, cases, lambda line: print(" ", line, flush=True))
        mistakes += results[name]["mistakes"]
        results[name]["mistakes"] = [mistake.to_dict() for mistake in results[name]["mistakes"]]
        results = {name: results[name] for name in SETS if name in results}
        report = settings | {"sets": results}
        (args.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    if mistakes:
        contact_sheet(mistakes).save(args.out / "mistakes.png")
    print(table(results))


if __name__ == "__main__":
    main()
