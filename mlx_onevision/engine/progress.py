"""How far the inference thread has come."""


class Progress:
    """steps : layer groups, groups of tiles, chunks and tokens so far; written by one thread, read
    by any.
    """

    def __init__(self) -> None:
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
