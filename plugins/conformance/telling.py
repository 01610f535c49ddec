"""Likelihoods of tokens, and answers that are documents of a schema."""

import json

import pytest

from mlx_onevision.plugins.conformance.subject import Subject
from mlx_onevision.plugins.contract.results import LEAST
from mlx_onevision.plugins.interface import (
    Backend,
    DoneEvent,
    GenerateRequest,
    GenerateResult,
    TextEvent,
)

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "grün", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "round": {"type": "boolean"},
        "sides": {"type": "array", "items": {"enum": [3, 4]}, "maxItems": 2},
    },
    "required": ["colour", "count", "round", "sides"],
    "additionalProperties": False,
}


class Telling(Subject):
    @pytest.mark.parametrize("count", [0, 3])
    def test_how_likely_every_token_was(self, backend: Backend, count: int) -> None:
        values = {**self.question(backend).to_dict(), "logprobs": count}
        request = GenerateRequest.from_dict(values)
        if not self.claims(backend, "logprobs"):
            assert self.refused(backend.generate(request)).code == "bad_request"
            return
        events = list(backend.generate(request))
        self.check_order(events)
        last = events[-1]
        assert isinstance(last, DoneEvent) and isinstance(last.result, GenerateResult), last
        told = last.result.logprobs
        assert told, "nothing is told"
        pieces = [event for event in events if isinstance(event, TextEvent)]
        assert told == tuple(token for event in pieces for token in event.logprobs)
        if "\ufffd" not in last.result.text:  # else the model has said what is no text
            assert b"".join(token.data for token in told) == last.result.text.encode()
        for token in told:
            assert token.token == token.data.decode("utf-8", "replace")
            assert LEAST <= token.logprob <= 1e-6
            likely = [other.logprob for other in token.top]
            assert likely == sorted(likely, reverse=True) and len(likely) <= count
            assert all(LEAST <= value <= 1e-6 for value in likely)
            if count:  # it was chosen for being the likeliest
                assert token.logprob >= likely[0] - 1e-3
        copy = GenerateResult.from_dict(json.loads(json.dumps(last.result.to_dict())))
        assert copy == last.result

    def test_telling_changes_no_answer(self, backend: Backend) -> None:
        request = self.question(backend)
        plain = self.answered(backend, request)
        assert plain.logprobs is None
        if self.claims(backend, "logprobs"):
            asked = GenerateRequest.from_dict({**request.to_dict(), "logprobs": 1})
            assert self.answered(backend, asked).text == plain.text

    def test_a_stop_string_cuts_what_is_told(self, backend: Backend) -> None:
        if not self.claims(backend, "logprobs"):
            return
        request = self.question(backend)
        whole = self.answered(backend, request).text
        stop = whole[len(whole) // 2 :][:2]
        values = {**request.to_dict(), "stop": [stop], "logprobs": 0}
        result = self.answered(backend, GenerateRequest.from_dict(values))
        assert result.text == whole[: whole.index(stop)] and result.logprobs is not None
        data = b"".join(token.data for token in result.logprobs)
        assert data.decode("utf-8", "replace").startswith(result.text)
        assert len(data) < len(whole.encode())

    @pytest.mark.parametrize("seed", range(4))
    def test_an_answer_is_a_document_of_a_schema(self, backend: Backend, seed: int) -> None:
        media = [self.picture(seed)] if seed % 2 and self.claims(backend, "images") else []
        request = GenerateRequest.ask(
            "What is it? Answer in JSON.",
            *media,
            json_schema=json.dumps(SCHEMA),
            max_tokens=200,
            temperature=float(seed > 0),
            seed=seed,
        )
        if not self.claims(backend, "json_schema"):
            assert self.refused(backend.generate(request)).code == "bad_request"
            return
        result = self.answered(backend, request)
        assert result.finish_reason == "stop", result
        found = json.loads(result.text)
        assert set(found) == set(SCHEMA["required"])
        assert found["colour"] in ("red", "grün", "blue")
        assert type(found["count"]) is int and 0 <= found["count"] <= 99
        assert type(found["round"]) is bool
        assert len(found["sides"]) <= 2 and set(found["sides"]) <= {3, 4}

    def test_a_schema_that_nothing_fits_is_refused(self, backend: Backend) -> None:
        nothing = {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]}
        request = GenerateRequest.ask("What is it?", json_schema=json.dumps(nothing))
        assert self.refused(backend.generate(request)).code == "bad_request"
