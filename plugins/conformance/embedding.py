"""Vectors: how many, how long, in what order, and of what."""

import json
import math
import time
from typing import Any, cast

import pytest

from mlx_onevision.plugins.conformance.subject import Subject
from mlx_onevision.plugins.interface import (
    Backend,
    DoneEvent,
    EmbedRequest,
    EmbedResult,
    Media,
    PluginError,
    ProgressEvent,
)


class Embedding(Subject):
    def test_vectors_of_every_space(self, backend: Backend) -> None:
        if not self.claims(backend, "embed"):
            with pytest.raises(PluginError) as raised:
                backend.embed(EmbedRequest([self.picture()]))
            self.check_sentence(raised.value)
            assert self.refused(backend.stream_embed(EmbedRequest([self.picture()]))).message
            return
        for space in backend.info().spaces:
            items: list[str | Media] = []
            if "image" in space.inputs:
                items += [self.picture(1), self.picture(2), self.picture(1)]
            if "text" in space.inputs:
                items += ["a red circle", "ein blauer Stern ★", "a red circle"]
            values = {**EmbedRequest(items, space="joint").to_dict(), "space": space.id}
            found = backend.embed(EmbedRequest.from_dict(values))
            assert found.space == space.id and found.dim == space.dim
            assert len(found.vectors) == len(items)
            for vector in found.vectors:
                assert math.isclose(math.hypot(*vector), 1.0, abs_tol=1e-3)
            for first in range(0, len(items), 3):
                one, other, again = found.vectors[first : first + 3]
                assert one == pytest.approx(again, abs=1e-4), "equal items, other vectors"
                assert one != pytest.approx(other, abs=1e-6), "other items, equal vectors"
            assert EmbedResult.from_dict(json.loads(json.dumps(found.to_dict()))) == found

    def test_many_vectors_are_those_of_each_alone(self, backend: Backend) -> None:
        if not self.claims(backend, "embed", "images"):
            return
        items = [self.picture(number) for number in range(12)]
        together = backend.embed(EmbedRequest(items)).vectors
        for place in (0, 11):
            (alone,) = backend.embed(EmbedRequest([items[place]])).vectors
            assert together[place] == pytest.approx(alone, abs=1e-3)
        assert backend.embed(EmbedRequest([])).vectors == ()

    def test_vectors_come_with_the_end_of_a_stream(self, backend: Backend) -> None:
        if not self.claims(backend, "embed", "images"):
            return
        request = EmbedRequest([self.picture(number) for number in range(12)])
        stream = backend.stream_embed(request)
        events = list(stream)
        self.check_order(events)
        last = events[-1]
        assert isinstance(last, DoneEvent) and isinstance(last.result, EmbedResult), last
        assert stream.result() == last.result and len(last.result.vectors) == 12
        for vector, same in zip(last.result.vectors, backend.embed(request).vectors, strict=True):
            assert vector == pytest.approx(same, abs=1e-4)
        for event in events[:-1]:
            assert isinstance(event, ProgressEvent)
            assert event.total is None or 0 <= event.done <= event.total

    def test_vectors_can_be_cancelled(self, backend: Backend) -> None:
        if not self.claims(backend, "embed", "images"):
            return
        request = EmbedRequest([self.picture(number) for number in range(12)])
        for read in (0, 1):
            stream = backend.stream_embed(request)
            for _ in range(read):
                next(stream)
            since = time.monotonic()
            stream.cancel()
            self.check_cancelled(stream, since)
        with backend.stream_embed(request) as stream:
            pass
        assert stream.ended
        self.wait_until_idle(backend)

    def test_an_item_that_cannot_be_read_is_named(self, backend: Backend) -> None:
        if not self.claims(backend, "embed", "images"):
            return
        broken = Media("image", data=b"no picture")
        request = EmbedRequest([self.picture(), broken])
        with pytest.raises(PluginError) as raised:
            backend.embed(request)
        self.check_sentence(raised.value)
        for error in (raised.value, self.refused(backend.stream_embed(request))):
            assert error.code == "unsupported_media" and "item 2" in error.message

    def test_what_is_no_request_for_vectors_is_refused(self, backend: Backend) -> None:
        assert self.refused(backend.stream_embed(cast(Any, {"items": []}))).code == "bad_request"

    def test_the_vision_space_has_no_place_for_text(self, backend: Backend) -> None:
        with pytest.raises(PluginError) as raised:
            backend.embed(EmbedRequest(["a red circle"], space="vision"))
        assert raised.value.code == "bad_request"
