"""Videos: asked about, and told segment by segment."""

import json
from itertools import pairwise

import pytest

from mlx_onevision.plugins.conformance.subject import Subject
from mlx_onevision.plugins.interface import (
    Backend,
    DescribeRequest,
    DescribeResult,
    DoneEvent,
    GenerateRequest,
    Media,
    PluginError,
    SegmentEvent,
    event_from_dict,
)


class Films(Subject):
    def test_a_question_about_a_video(self, backend: Backend) -> None:
        film = self.film() if self.claims(backend, "videos") else Media("video", data=b"\0" * 64)
        request = GenerateRequest.ask("What happens?", film, num_frames=4, max_tokens=4)
        if self.claims(backend, "videos"):
            assert self.answered(backend, request).usage.prompt_tokens >= 0
        else:
            assert self.refused(backend.generate(request)).code == "unsupported_media"

    def test_a_video_is_told_in_segments(self, backend: Backend) -> None:
        if not self.claims(backend, "describe_video"):
            request = DescribeRequest(Media("video", data=b"\0" * 64))
            self.refused(backend.describe_video(request))
            return
        stream = backend.describe_video(DescribeRequest(self.film(), segments=1.0, num_frames=2))
        events = list(stream)
        self.check_order(events)
        last = events[-1]
        assert isinstance(last, DoneEvent) and isinstance(last.result, DescribeResult), last
        told = tuple(event.segment for event in events if isinstance(event, SegmentEvent))
        assert told == last.result.segments and len(told) >= 2
        assert [segment.index for segment in told] == list(range(len(told)))
        for one, next_one in pairwise(told):
            assert one.start < one.end <= next_one.start + 1e-6
        assert told[-1].end <= last.result.duration + 1e-6
        for event in events:
            assert event_from_dict(json.loads(json.dumps(event.to_dict()))) == event

    def test_a_description_can_be_cancelled(self, backend: Backend) -> None:
        if not self.claims(backend, "describe_video"):
            return
        request = DescribeRequest(self.film(), segments=0.5)
        with backend.describe_video(request) as stream:
            next(stream)
        with pytest.raises(PluginError) as raised:
            stream.result()
        assert raised.value.code == "cancelled"
        self.wait_until_idle(backend)

    def test_a_picture_is_not_described_as_a_video(self) -> None:
        with pytest.raises(PluginError) as raised:
            DescribeRequest(self.picture())
        assert raised.value.code == "bad_request"
