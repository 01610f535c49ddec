"""Questions as arrays: a row of token ids for each sample, and what is to be answered where.

The questions of a sample all stand right behind its media. They share that prefix and do not see
each other (`group`), and each is numbered as if it were alone (`place`), so that a picture is
encoded once and still every question is a conversation of its own. Often some of them form one
conversation of two to four turns.

Text alone has no media. What is too long for the buffer (`TextBuffer`) begins where media would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from examples.demo_model import narrating
from examples.demo_model.samples import LABEL, SLOTS, TEXT, TURNS, ask_nothing
from examples.demo_model.words import Words


@dataclass
class Buffers:
    """Question buffers of n samples."""

    ids: NDArray[np.int16]  # (n, TEXT)
    group: NDArray[np.uint8]  # (n, TEXT), conversation from 1; 0 is unused
    place: NDArray[np.uint8]  # (n, TEXT), position behind the media
    target: NDArray[np.int16]  # (n, TEXT), the answer's token that comes next, or -1
    turn: NDArray[np.uint8]  # (n, TEXT), number of the target's question, from 1
    label: NDArray[np.uint8]  # (n, TEXT), what the target's question is counted as

    @classmethod
    def empty(cls, count: int) -> Buffers:
        shape = (count, TEXT)
        return cls(
            np.zeros(shape, np.int16),
            np.zeros(shape, np.uint8),
            np.zeros(shape, np.uint8),
            np.full(shape, -1, np.int16),
            np.zeros(shape, np.uint8),
            np.zeros(shape, np.uint8),
        )

    def fill(
        self,
        row: int,
        turns: Sequence[tuple[str, str, str]],
        words: Words,
        rng: Random,
        chained: float = 0.5,
    ) -> None:
        """Put the questions into a row, as many as there is room for.

        With a chance of `chained`, two to four of them are one conversation.
        """
        talks = [[turn] for turn in turns]
        if len(turns) > 1 and rng.random() < chained:
            mixed = rng.sample(range(len(turns)), min(len(turns), rng.randint(2, 4)))
            rest = [[turn] for index, turn in enumerate(turns) if index not in mixed]
            talks = [[turns[index] for index in mixed], *rest]
        start, number, count = 0, 1, 1
        for talk in talks:
            ids, replies = talk_ids(talk, words)
            stop = start + len(ids)
            if stop > TEXT:
                continue
            self.ids[row, start:stop] = ids
            self.group[row, start:stop] = number
            self.place[row, start:stop] = np.arange(len(ids))
            for index, (first, last) in enumerate(replies):
                label = TURNS[index - 1] if index else talk[0][0]
                self.answer(row, ids[first:last], start + first - 1, count, label)
                count += 1
            start, number = stop, number + 1

    def answer(self, row: int, reply: Sequence[int], at: int, turn: int, label: str) -> None:
        """What is to be said from position `at` on."""
        where = slice(at, at + len(reply))
        self.target[row, where] = reply
        self.turn[row, where] = turn
        self.label[row, where] = LABEL[label]


def talk_ids(
    talk: Sequence[tuple[str, str, str]], words: Words
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a conversation behind its media, and where each answer begins and ends."""
    ids: list[int] = []
    replies = []
    for index, (_, question, answer) in enumerate(talk):
        if index:
            ids += words.next[1:-1]  # its end is said; the newline begins the next question
        # An earlier answer stands behind a space, which the template puts where media would be.
        ids += words.encode("\n" + question)
        ids += words.reply if index == len(talk) - 1 else words.replied
        first = len(ids)
        ids += (*words.encode(answer), *words.end)
        replies.append((first, len(ids)))
    return ids, replies


def _text_only(rng: Random, words: Words, room: int) -> tuple[str, str, str]:
    """A question about as many captions as there is room for."""
    kind, story = rng.choice(narrating.TOLD_KINDS), narrating.sample_story(rng)
    turn = narrating.ask_told(story, kind)
    while len(talk_ids([turn], words)[0]) > room:
        story = story[: len(story) * 3 // 4]
        turn = narrating.ask_told(story, kind)
    return turn


@dataclass
class TextBuffer:
    """Text alone, n samples: `buffers`, and what stands before them in place of media."""

    slots: NDArray[np.int16]  # (n, SLOTS)
    rows: NDArray[np.int16]  # (n,), how many of the slots are in use
    buffers: Buffers

    @classmethod
    def empty(cls, count: int) -> TextBuffer:
        return cls(
            np.zeros((count, SLOTS), np.int16), np.zeros(count, np.int16), Buffers.empty(count)
        )

    def fill(self, row: int, words: Words, rng: Random) -> None:
        """Short questions, or one or two about the captions of a video."""
        if rng.random() < 0.3:
            self.buffers.fill(row, ask_nothing(rng), words, rng)
            return
        turn = _text_only(rng, words, SLOTS + TEXT)
        ids, ((first, last),) = talk_ids([turn], words)
        if len(ids) > TEXT // 2 or rng.random() < 0.3:
            split = rng.randint(max(0, len(ids) - TEXT), min(SLOTS, first - 1))
            self.rows[row] = split
            self.slots[row, :split] = ids[:split]
            kept = ids[split:]
            self.buffers.ids[row, : len(kept)] = kept
            self.buffers.group[row, : len(kept)] = 1
            self.buffers.place[row, : len(kept)] = np.arange(len(kept))
            at = first - 1 - split
            self.buffers.answer(row, ids[first:last], at, 1, turn[0])
            return
        self.buffers.fill(row, [turn, _text_only(rng, words, TEXT)], words, rng, chained=0)
