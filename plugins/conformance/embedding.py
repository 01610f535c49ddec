"""Vectors: how many, how long, in what order, and of what."""

import json
import math

import pytest

from mlx_onevision.plugins.conformance.subject import Subject
from mlx_onevision.plugins.interface import Backend, EmbedRequest, EmbedResult, Media, PluginError


class Embedding(Subject):
    def test_vectors_of_every_space(self, backend: Backend) -> None:
        if not self.claims(backend, "embed"):
            with pytest.raises(PluginError) as raised:
                backend.embed(EmbedRequest([self.picture()]))
            return self.check_sentence(raised.value)
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

    def test_an_item_that_cannot_be_read_is_named(self, backend: Backend) -> None:
        if not self.claims(backend, "embed", "images"):
            return
        broken = Media("image", data=b"no picture")
        with pytest.raises(PluginError) as raised:
            backend.embed(EmbedRequest([self.picture(), broken]))
        self.check_sentence(raised.value)
        assert raised.value.code == "unsupported_media" and "item 2" in raised.value.message

    def test_the_vision_space_has_no_place_for_text(self, backend: Backend) -> None:
        with pytest.raises(PluginError) as raised:
            backend.embed(EmbedRequest(["a red circle"], space="vision"))
        assert raised.value.code == "bad_request"
