# pyright: reportUnknownMemberType=false
"""What ``doctor`` asks MLX, each question in a process of its own with a time limit: a call into a
driver, or to another rank, may crash or never return.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from mlx_onevision.distributed import RANKS
from mlx_onevision.subprocesses import import_path

ANSWERS = {"Is there a circle?": "Yes", "Is there a star?": "No"}
"""The first tokens of the demo model's answers about a red circle."""
HIDDEN, PROMPT = 3584, 4096  # values of a token of the 7B model, and tokens of a prompt


def run_part(part: Literal["device", "answer", "link"], seconds: int) -> dict[str, Any]:
    """What the function of that name returns, or {"problem": why it did not}."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(import_path())}
    for name in RANKS if part != "link" else ():
        environment.pop(name, None)  # by itself, as if mlx.launch had not started it
    try:
        done = subprocess.run(  # noqa: S603 (this interpreter, this file)
            [sys.executable, "-m", "mlx_onevision.bench.selftest", part, str(seconds)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            timeout=seconds + 5,
        )
        if done.returncode == -signal.SIGALRM:
            return {"problem": f"no end after {seconds} s"}
        if done.returncode:
            return {"problem": f"its process ended with code {done.returncode}"}
        return json.loads(done.stdout.splitlines()[-1])
    except Exception as error:
        return {"problem": reason(error)}


def reason(error: Exception) -> str:
    """An error without what may be private: words that look like paths, and whatever is the value
    of an environment variable, or the name of the user or of the machine.
    """
    text, host, home = str(error), socket.gethostname(), Path(os.path.expanduser("~"))
    for value in sorted({*os.environ.values(), str(home)}, key=len, reverse=True):
        if len(value) > 2:
            text = text.replace(value, "…")
    for name in filter(None, (host, host.partition(".")[0], home.name)):
        text = re.sub(rf"\b{re.escape(name)}\b", "…", text)
    text = " ".join("…" if re.search(r"[/\\@]", word) else word for word in text.split())
    return f"{type(error).__name__}: {text[:200]}".rstrip(": .")


def device() -> dict[str, Any]:
    """MLX's backend and device, and the bytes that it should use."""
    import mlx.core as mx

    from mlx_onevision.engine.memory import working_set

    backend = "Metal" if mx.metal.is_available() else "CUDA" if mx.cuda.is_available() else "CPU"
    name = str(mx.device_info().get("device_name", backend))
    return {"backend": backend, "name": name, "usable_bytes": working_set()}


def answer() -> dict[str, Any]:
    """One token of the demo model for each question of :data:`ANSWERS`, and its seconds; the first
    with those of loading.
    """
    from PIL import Image, ImageDraw

    from mlx_onevision.api import load

    image = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(image).ellipse((24, 24, 72, 72), fill="red")
    started = time.perf_counter()
    texts: list[str] = []
    seconds: list[float] = []
    with closing(load("demo")) as model:
        for question in ANSWERS:
            texts.append(model.generate(question, images=[image], max_tokens=1).text)
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
    return {"answers": texts, "seconds": seconds}


def link() -> dict[str, Any]:
    """How long the ranks take to sum one token's values, and many tokens'. Bytes a second are those
    that each rank sends in a ring: 2 (n - 1) / n of the array's, as NCCL's own tests count them.
    """
    import mlx.core as mx

    group = mx.distributed.init(strict=True)
    count = group.size()

    def seconds(array: mx.array) -> float:
        started = time.perf_counter()
        mx.eval(mx.distributed.all_sum(array, group=group))
        return time.perf_counter() - started

    token, prompt = (mx.zeros((rows, HIDDEN), mx.bfloat16) for rows in (1, PROMPT))
    mx.eval(token, prompt)
    latency = sorted(seconds(token) for _ in range(51))[25]
    sent = 2 * (count - 1) / count * prompt.nbytes
    rate = sent / min(seconds(prompt) for _ in range(4))
    return {"count": count, "latency_seconds": latency, "bytes_per_second": rate}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"device": device, "answer": answer, "link": link}

if __name__ == "__main__":
    # Ends it inside a call that never returns to Python, too, and where its parent is gone.
    signal.alarm(int(sys.argv[2]))
    try:
        result = PARTS[sys.argv[1]]()
    except Exception as error:
        result = {"problem": reason(error)}
    print(json.dumps(result))
