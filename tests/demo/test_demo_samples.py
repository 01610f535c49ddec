"""The demo model's training samples: the same ones, whatever the number of processes."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# In a process of its own, because it forks.
PROGRAM = """
import hashlib
from dataclasses import replace
from itertools import islice
from examples.demo_model.layouts import make_layouts
from examples.demo_model.making import Makers
from examples.demo_model.samples import GROUPS
from examples.demo_model.words import Words, build_tokenizer

words, layouts = Words(build_tokenizer(200)), make_layouts(0, 4)
groups = [replace(group, count=2, exact=1) for group in GROUPS]
for workers, first in ((2, 0), (4, 0), (2, 1200)):
    makers = Makers(layouts, words, 0, workers, 2, first, groups, text_only=3)
    made = hashlib.sha256()
    for rounds in (makers.drawn(), makers.exact()):
        for parts in islice(rounds, 4):
            for part in parts:
                for name in sorted(part):
                    made.update(part[name].tobytes())
    makers.close()
    print(first, made.hexdigest())
"""


def test_samples_do_not_depend_on_the_number_of_processes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    two, four, later = done.stdout.splitlines()
    assert two == four
    assert two.split()[1] != later.split()[1]
