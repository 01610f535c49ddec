"""Wrong answers with what they are about, on one sheet, to look at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageOps

from examples.demo_model.cases import Case, PromptRequest

CELL = (300, 300)  # width, height
_PICTURES = 190  # of the height


@dataclass(frozen=True)
class Mistake:
    """A question that was answered wrongly."""

    case: Case
    question: PromptRequest
    answer: str

    def to_dict(self) -> dict[str, object]:
        return {
            "case": self.case.name,
            "sizes": [list(scene.size) for scene in self.case.medium.scenes],
            "kind": self.question.kind,
            "question": self.question.text,
            "right": self.question.answer,
            "answer": self.answer,
        }


def _cell(mistake: Mistake) -> Image.Image:
    cell = Image.new("RGB", CELL, (225, 225, 225))
    drawn = mistake.case.draw()
    pictures = drawn[:: max(1, len(drawn) // 4)][:4]  # some frames of a video
    wide = CELL[0] // max(1, len(pictures))
    for number, picture in enumerate(pictures):
        cell.paste(ImageOps.contain(picture, (wide - 6, _PICTURES)), (number * wide + 3, 3))
    scenes = mistake.case.medium.scenes
    size = "x".join(map(str, scenes[0].size[::-1])) if scenes else "words"
    lines = (f"{size} {mistake.question.kind}", *map(" > ".join, mistake.question.history))
    lines += (f"? {mistake.question.text}", f"+ {mistake.question.answer}", f"- {mistake.answer}")
    text = "\n".join(part for line in lines for part in textwrap.wrap(line, 46))
    ImageDraw.Draw(cell).text((4, _PICTURES + 8), text, fill=(0, 0, 0))
    return cell


def contact_sheet(mistakes: Sequence[Mistake], columns: int = 5, most: int = 60) -> Image.Image:
    """The first mistakes, a cell each: picture, question, right answer (+), given answer (-)."""
    cells = [_cell(mistake) for mistake in mistakes[:most]]
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (CELL[0] + 4), rows * (CELL[1] + 4)), (255, 255, 255))
    for number, cell in enumerate(cells):
        at = (number % columns * (CELL[0] + 4), number // columns * (CELL[1] + 4))
        sheet.paste(cell, at)
    return sheet
