"""The suite as a plugin of pytest, in a process of its own: a good backend passes, and one that is
broken in one place does not.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from served import EXAMPLES

from mlx_onevision.plugins import discovery

# What a third party may get wrong, each in a backend that is good otherwise.
BACKENDS = '''
import threading

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.interface import (
    Channel, DoneEvent, ErrorEvent, EventStream, TextEvent, UsageEvent
)


class Good(FakeBackend):
    """As it should be."""


class Relay(FakeBackend):
    """Hands its events on by way of a channel of its own."""

    channel = Channel

    def generate(self, request):
        inner, channel = super().generate(request), self.channel()
        channel.at_end(inner.cancel)
        stream = channel.stream()
        threading.Thread(target=self.relay, args=(inner, channel), daemon=True).start()
        return stream

    def relay(self, inner, channel):
        for event in inner:
            channel.put(event)


class LosesADelta(Relay):
    def relay(self, inner, channel):
        said = 0
        for event in inner:
            said += isinstance(event, TextEvent)
            if not isinstance(event, TextEvent) or said != 2:
                channel.put(event)


class Deaf(Channel):
    def fail(self, error):
        self.left = getattr(self, "left", False) or error.code == "cancelled"
        return False if error.code == "cancelled" else super().fail(error)

    def put(self, event):
        return False if getattr(self, "left", False) else super().put(event)


class NeverEnds(Relay):
    channel = Deaf


class Crosses(FakeBackend):
    under_way = []

    def generate(self, request):
        others = [stream for stream in self.under_way if not stream[1].ended]
        if others and not request.timeout:
            request = others[-1][0]
        stream = super().generate(request)
        self.under_way[:] = [*others, (request, stream)]
        return stream


class Raises(FakeBackend):
    def generate(self, request):
        stream = super().generate(request)
        if any(medium.data and len(medium.data) < 50 for medium in request.media):
            stream.result()
        return stream


class TellsTheEndTwice(Relay):
    def relay(self, inner, channel):
        for event in inner:
            if isinstance(event, UsageEvent):
                channel.put(event)
            channel.put(event)


class KeepsItsPlaces(FakeBackend):
    lost = 0

    def generate(self, request):
        stream = super().generate(request)
        stream._channel.at_end(self.lose)
        return stream

    def lose(self):
        self.lost += 1

    def info(self):
        from dataclasses import replace
        return replace(super().info(), active=min(self.lost, 8))
'''

# And the test that has to notice, all by itself.
MUTANTS = {
    "LosesADelta": "test_the_stream_is_the_whole_in_order",
    "NeverEnds": "test_cancelled_at_once",
    "Crosses": "test_every_thread_gets_its_own_answer",
    "Raises": "test_what_is_no_medium_is_refused",
    "TellsTheEndTwice": "test_the_stream_is_the_whole_in_order",
    "KeepsItsPlaces": "test_cancelled_at_once",
}


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of somebody else's that is installed."""
    folder = tmp_path_factory.mktemp("brought")
    folder.joinpath("brings_mutants.py").write_text(BACKENDS, encoding="utf-8")
    metadata = folder / "brings_mutants-1.0.dist-info"
    metadata.mkdir()
    metadata.joinpath("METADATA").write_text("Name: brings-mutants\nVersion: 1.0\n")
    lines = [f"{name} = brings_mutants:{name}\n" for name in ("Good", *MUTANTS)]
    metadata.joinpath("entry_points.txt").write_text(f"[{discovery.GROUP}]\n{''.join(lines)}")
    return folder


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The suite, run from a folder in which there is nothing of this package's."""
    plugin = "mlx_onevision.plugins.conformance"
    command = [sys.executable, "-m", "pytest", "-p", f"{plugin}.plugin", "-p", "no:cacheprovider"]
    command += ["--tb=short", "--pyargs", f"{plugin}.plugin", *options]
    places = [str(folder), str(Path(__file__).parents[2])]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
        timeout=100,
    )


def suite(folder: Path, backend: str, *options: str) -> subprocess.CompletedProcess[str]:
    video = str(EXAMPLES / "circle.mp4")
    story = "a very long story " * 100
    settings = ("--setting", "delay=0.01", "--video", video, "--long-request", story)
    return run(folder, "--backend", backend, *settings, *options)


def test_a_good_one_passes(brought: Path) -> None:
    found = suite(brought, "Good")
    assert found.returncode == 0 and " passed" in found.stdout, found.stdout


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_one_does_not(brought: Path, mutant: str) -> None:
    found = suite(brought, mutant, "--answer-timeout", "3", "-k", MUTANTS[mutant])
    assert found.returncode == 1 and " failed" in found.stdout, found.stdout
    assert "ERROR" not in found.stdout, found.stdout
    assert ("nothing has come" in found.stdout) == (mutant == "NeverEnds")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "--backend is missing; there are "),
        (("--backend", "none"), "there is no backend 'none'; there are "),
        (("--backend", "fake", "--setting", "delay"), "--setting takes KEY=VALUE, not 'delay'"),
        (("--backend", "fake", "--video", "nowhere.mp4"), "there is no file 'nowhere.mp4'"),
    ],
)
def test_options_that_name_nothing(brought: Path, options: tuple[str, ...], said: str) -> None:
    found = run(brought, *options)
    assert found.returncode == 4 and said in found.stderr and "Traceback" not in found.stderr
