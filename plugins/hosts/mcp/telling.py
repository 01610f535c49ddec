"""The tools that tell a long video part by part: started, asked after, cancelled."""

import time
from dataclasses import dataclass

import anyio
import mcp_types as types

from mlx_onevision.describe.formats import Segment, VideoDescription, write
from mlx_onevision.plugins.contract.requests import DescribeRequest
from mlx_onevision.plugins.contract.results import DescribeResult
from mlx_onevision.plugins.hosts.mcp import schemas
from mlx_onevision.plugins.hosts.mcp.allowed_files import Places
from mlx_onevision.plugins.hosts.mcp.ask import UNTRUSTED
from mlx_onevision.plugins.hosts.mcp.call import Call, blocking
from mlx_onevision.plugins.hosts.mcp.settings import McpSettings
from mlx_onevision.plugins.hosts.mcp.tool import Tool, offered
from mlx_onevision.plugins.service.jobs import UNDER_WAY, Job, Jobs

POLL_SECONDS = 0.2
SEGMENTS = 100  # of one answer; hosts cut long ones off

STARTS = types.ToolAnnotations(read_only_hint=True, idempotent_hint=False, open_world_hint=False)
ENDS = types.ToolAnnotations(
    read_only_hint=False, destructive_hint=False, idempotent_hint=True, open_world_hint=False
)


@dataclass(frozen=True)
class Telling:
    jobs: Jobs
    places: Places
    settings: McpSettings

    def tools(self) -> list[Tool]:
        seconds = self.settings.timeout
        return [
            offered(
                "describe_video_start",
                "Describe a long video",
                "Begins to describe a video on this computer segment by segment, with a summary, "
                "chapters and subtitles (SRT) at the end, and returns a job_id at once: it takes "
                "minutes. Ask describe_video_status for what is told so far. Sound is not heard.",
                schemas.DescribeStart,
                schemas.Started,
                self.start,
                seconds=seconds,
                annotations=STARTS,
            ),
            offered(
                "describe_video_status",
                "How far a description is",
                "How far a description is, and its segments so far; once it is done also summary, "
                f"chapters and SRT. Waits for the end a while, see wait. {UNTRUSTED}",
                schemas.DescribeStatus,
                schemas.Status,
                self.status,
                seconds=seconds,
                keeps_time=True,
            ),
            offered(
                "describe_video_cancel",
                "Stop a description",
                "Stops a description that is under way. What was told so far is kept.",
                schemas.DescribeCancel,
                schemas.Cancelled,
                self.cancel,
                seconds=seconds,
                annotations=ENDS,
            ),
        ]

    async def start(self, asked: schemas.DescribeStart, call: Call) -> schemas.Started:
        film = await blocking(lambda: self.places.medium(asked.path, "video"))
        request = DescribeRequest(
            film,
            segments=asked.segments,
            num_frames=asked.num_frames,
            start=asked.start,
            end=asked.end,
        )
        return schemas.Started(job_id=(await blocking(lambda: self.jobs.start(request))).id)

    async def status(self, asked: schemas.DescribeStatus, call: Call) -> schemas.Status:
        until = time.monotonic() + min(asked.wait, call.left)
        job = self.jobs.status(asked.job_id)
        while job.status in UNDER_WAY and time.monotonic() < until:
            if job.progress is not None:
                await call.follow(job.progress)
            await anyio.sleep(POLL_SECONDS)
            job = self.jobs.status(asked.job_id)
        return _shown(job, asked.first_segment, asked.srt)

    async def cancel(self, asked: schemas.DescribeCancel, call: Call) -> schemas.Cancelled:
        job = await blocking(lambda: self.jobs.cancel(asked.job_id))
        return schemas.Cancelled(job_id=job.id, status=job.status)


def subtitles(result: DescribeResult) -> str:
    """A description as the text of an SRT file."""
    segments = tuple(Segment(s.start, s.end, s.text) for s in result.segments)
    return write(VideoDescription("video", result.duration, "", segments), "srt")


def _shown(job: Job, first: int, srt: bool) -> schemas.Status:
    shown = job.segments[first : first + SEGMENTS]
    reached = first + len(shown)
    status = schemas.Status(
        job_id=job.id,
        status=job.status,
        seconds=job.seconds,
        segments=[schemas.Segment(start=s.start, end=s.end, text=s.text) for s in shown],
        next_segment=reached,
        more=reached < len(job.segments),
    )
    if job.status in UNDER_WAY and job.progress is not None:
        status.stage, status.done, status.total = (
            job.progress.stage,
            job.progress.done,
            job.progress.total,
        )
    if job.error is not None and job.status == "failed":
        status.error = str(job.error.error)
    if job.result is not None:
        status.summary = job.result.summary
        status.chapters = [
            schemas.Chapter(start=c.start, title=c.title) for c in job.result.chapters
        ]
        status.srt = subtitles(job.result) if srt else None
        status.warnings = list(job.result.warnings)
    return status
