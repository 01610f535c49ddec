"""Descriptions that are asked after: their states, their bounds, and their end."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import wait_for

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.interface import DescribeRequest, Media
from mlx_onevision.plugins.service.jobs import UNDER_WAY, Job, Jobs, NoSuchJob
from mlx_onevision.plugins.service.service import Limits

VIDEO = Path(__file__).parents[2].joinpath("examples/circle.mp4").read_bytes()


def request(segments: float = 10.0, **settings: Any) -> DescribeRequest:
    """One of 30 seconds, for the fake backend."""
    return DescribeRequest(Media("video", data=VIDEO), segments=segments, **settings)


def ended(jobs: Jobs, job: Job) -> Job:
    wait_for(lambda: jobs.status(job.id).status not in UNDER_WAY)
    return jobs.status(job.id)


@pytest.fixture
def slow() -> Iterator[FakeBackend]:
    with FakeBackend(delay=0.02, limits=Limits(active=1, waiting=4)) as backend:
        yield backend


def test_started_followed_and_collected(slow: FakeBackend) -> None:
    with Jobs(slow) as jobs:
        job = jobs.start(request(3.0))
        assert job.status in UNDER_WAY and job.result is None and job.forgotten_after is None
        behind = jobs.start(request())
        assert behind.status == "queued" and behind.id != job.id and len(behind.id) >= 32
        wait_for(lambda: len(jobs.status(job.id).segments) >= 2)
        seen = jobs.status(job.id)
        assert seen.status == "running" and seen.progress is not None and seen.progress.total == 10
        assert jobs.status(behind.id).status == "queued"
        done = ended(jobs, job)
        assert done.status == "done" and done.result is not None and done.error is None
        assert done.segments == done.result.segments and len(done.segments) == 10
        assert done.segments[: len(seen.segments)] == seen.segments
        assert done.seconds >= 0.2 and 890 < (done.forgotten_after or 0) <= 900
        assert jobs.status(job.id).seconds == done.seconds
        assert Job.from_dict(json.loads(json.dumps(done.to_dict()))) == done
        assert ended(jobs, behind).status == "done"


def test_cancelled(slow: FakeBackend) -> None:
    with Jobs(slow) as jobs:
        job, behind = jobs.start(request(0.5)), jobs.start(request())
        wait_for(lambda: jobs.status(job.id).segments)
        for one in (behind, job):
            over = jobs.cancel(one.id)
            assert over.status == "cancelled" and over.error and over.error.code == "cancelled"
            assert jobs.cancel(one.id).status == "cancelled"
        assert jobs.status(job.id).segments and not jobs.status(behind.id).segments
        wait_for(lambda: slow.info().active == slow.info().waiting == 0)
        done = ended(jobs, jobs.start(request()))
        assert jobs.cancel(done.id).status == "done"


def test_failed() -> None:
    with FakeBackend(fail_at=2, delay=0.05) as backend, Jobs(backend) as jobs:
        job = ended(jobs, jobs.start(request()))
        assert job.status == "failed" and job.error and job.error.code == "internal"
        assert len(job.segments) == 2 and job.result is None
        late = ended(jobs, jobs.start(request(timeout=0.01)))
        assert late.status == "failed" and late.error and late.error.code == "cancelled"


def test_what_is_refused_at_once_is_no_job(slow: FakeBackend) -> None:
    with Jobs(slow, max_under_way=2) as jobs:
        with pytest.raises(PluginError, match="not allowed here"):
            jobs.start(DescribeRequest(Media("video", path="/etc/passwd")))
        jobs.start(request())
        jobs.start(request())
        with pytest.raises(PluginError, match="2 descriptions are under way") as raised:
            jobs.start(request())
        assert raised.value.code == "busy" and raised.value.hint
    with pytest.raises(PluginError, match="no more descriptions"):
        jobs.start(request())
    with pytest.raises(NoSuchJob, match="there is no such job"):
        jobs.status("0" * 32)


def test_the_oldest_ended_ones_make_room() -> None:
    with FakeBackend() as backend, Jobs(backend, max_jobs=2) as jobs:
        first = ended(jobs, jobs.start(request()))
        second = ended(jobs, jobs.start(request()))
        third = jobs.start(request())
        with pytest.raises(NoSuchJob):
            jobs.status(first.id)
        assert jobs.status(second.id).status == "done" and ended(jobs, third).status == "done"


def test_bytes_are_bounded(slow: FakeBackend) -> None:
    with Jobs(slow, max_bytes=len(VIDEO) - 1) as jobs:
        with pytest.raises(PluginError, match="send something smaller"):
            jobs.start(request())
    with Jobs(slow, max_bytes=len(VIDEO) + 2000) as jobs:
        job = jobs.start(request())
        with pytest.raises(PluginError, match="too large; try again") as raised:
            jobs.start(request())
        assert raised.value.code == "busy"
        assert ended(jobs, job).status == "done"
        many = ended(jobs, jobs.start(request(1.0)))  # the earlier one made room for its segments
        assert many.status == "failed" and many.error and many.error.code == "too_large"
        assert 0 < len(many.segments) < 30
        with pytest.raises(NoSuchJob):
            jobs.status(job.id)
        wait_for(lambda: slow.info().active == 0)


def test_forgotten_when_its_time_is_over() -> None:
    with FakeBackend() as backend, Jobs(backend, retention_seconds=0.2) as jobs:
        job = ended(jobs, jobs.start(request()))
        assert job.status == "done"
        time.sleep(0.25)
        for look in (jobs.status, jobs.cancel):
            with pytest.raises(NoSuchJob, match=r"0\.2 seconds"):
                look(job.id)


def test_without_a_thread_it_is_no_job(slow: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "mlx-onevision-job":
            raise RuntimeError("can't start new thread")
        start(thread)

    with Jobs(slow, max_under_way=1) as jobs:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(PluginError, match="RuntimeError") as raised:
                jobs.start(request())
            assert raised.value.code == "internal"
        wait_for(lambda: slow.info().active == slow.info().waiting == 0)  # nothing is described
        assert ended(jobs, jobs.start(request())).status == "done"


def test_closing_ends_them_and_leaves_the_backend(slow: FakeBackend) -> None:
    jobs = Jobs(slow)
    for _ in range(3):
        jobs.start(request(0.1))
    jobs.close()
    jobs.close()
    wait_for(lambda: slow.info().active == slow.info().waiting == 0)
    assert not [t for t in threading.enumerate() if t.name == "mlx-onevision-job"]
    with Jobs(slow) as others:
        assert ended(others, others.start(request())).status == "done"
