"""A process that bounds itself: it ends for what it does, and not for what started it."""

import subprocess
import sys
from pathlib import Path

LIMIT = 256 << 20
ROOT = Path(__file__).parents[1]

CHILD = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from mlx_onevision.subprocesses import confine
confine({LIMIT})
time.sleep(0.5)
print("it lives")
try:
    held = bytearray({2 * LIMIT})
    for page in range(0, len(held), 4096):
        held[page] = 1
    time.sleep(0.5)
    print("it was let")
except MemoryError:
    print("it was refused")
"""

PARENT = f"""
import subprocess, sys
held = bytearray({2 * LIMIT})
for page in range(0, len(held), 4096):
    held[page] = 1
done = subprocess.run([sys.executable, "-I", "-c", {CHILD!r}], stdout=subprocess.PIPE)
sys.stdout.buffer.write(done.stdout)
"""


def test_a_large_parent_is_no_reason_to_end() -> None:
    """On Linux a process begins with its parent's peak as its own, which for a host with a model in
    it is more than any decoder may take.
    """
    done = subprocess.run([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, check=True)
    lines = done.stdout.decode().splitlines()
    assert lines[:1] == ["it lives"] and "it was let" not in lines


def test_it_ends_with_its_parent() -> None:
    script = f"""
import subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-I", "-c", '''
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from mlx_onevision.subprocesses import confine
confine({LIMIT})
print("begun", flush=True)
time.sleep(60)
'''], stdout=subprocess.PIPE)
print(child.stdout.readline().decode(), child.pid, flush=True)
"""
    begun = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True)
    pid = begun.stdout.split()[-1].decode()
    done = subprocess.run(
        ["sh", "-c", f"for i in $(seq 100); do kill -0 {pid} || exit 0; sleep 0.1; done; exit 1"]
    )
    assert done.returncode == 0
