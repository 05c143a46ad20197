"""Prompts are rewritten by a language model of the OpenAI interface; what goes wrong there is said."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from opensora_like.evaluation.refine_prompt import INSTRUCTIONS, ChatEndpoint, choose_motion, refine
from tests.evaluation.local_server import Answer, LanguageModel, serving


def said(content: Any, finish_reason: str = "stop") -> Answer:
    choice = {"message": {"content": content}, "finish_reason": finish_reason}
    return Answer(body=json.dumps({"choices": [choice]}).encode())


def endpoint_at(url: str) -> ChatEndpoint:
    return ChatEndpoint(f"{url}/v1", "secret-key", "small", timeout_seconds=10, retry_waits=(0.0, 0.0))


def test_the_request_is_that_of_the_published_system() -> None:
    """Instruction and prompt, temperature 0.01, top_p 0.7, 250 tokens, the key in the header; each task its own."""
    model = LanguageModel()
    with serving(model) as url:
        assert refine(endpoint_at(url), "raining, sea", "t2v") == "raining, sea, in full"
        assert choose_motion(endpoint_at(url), "raining, sea") == 7.0
    first = model.asked[0]
    assert (first["model"], first["temperature"], first["top_p"], first["max_tokens"]) == ("small", 0.01, 0.7, 250)
    assert first["authorization"] == "Bearer secret-key"
    assert [m["role"] for m in first["messages"]] == ["system", "user"]
    assert first["messages"][0]["content"] == INSTRUCTIONS["t2v"] and len(set(INSTRUCTIONS.values())) == 3


def test_the_environment_names_the_server() -> None:
    """Key, address and model; a missing key says what to set, and the key is in no text."""
    given = {"OPENAI_API_KEY": "secret-key", "OPENAI_BASE_URL": "http://here:1/v1/", "OPENAI_MODEL": "small"}
    endpoint = ChatEndpoint.from_environment("refine_prompt", given)
    assert (endpoint.url, endpoint.key, endpoint.model) == ("http://here:1/v1", "secret-key", "small")
    assert "secret-key" not in repr(endpoint)
    plain = ChatEndpoint.from_environment("refine_prompt", {"OPENAI_API_KEY": "k"})
    assert plain.url.startswith("https://") and plain.model == "gpt-4o"
    with pytest.raises(ValueError, match="refine_prompt asks a language model, and OPENAI_API_KEY is not set"):
        ChatEndpoint.from_environment("refine_prompt", {})
    with pytest.raises(ValueError, match="OPENAI_BASE_URL='file:///x' must begin with http"):
        ChatEndpoint.from_environment("refine_prompt", {**given, "OPENAI_BASE_URL": "file:///x"})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(401, b'{"error": {"message": "no such key"}}'), "answered 401: no such key; check OPENAI_API_KEY"),
        (Answer(404, b"<html>", "text/html"), "answered 404: <html>"),
        (Answer(503, b'{"error": "overloaded"}'), r"answered 503: overloaded \(3 attempts\)"),
        (Answer(200, b"hello", "text/plain"), "did not answer in JSON but b'hello'"),
        (Answer(200, b'{"ok": true}'), "answered without a choice"),
        (said(""), "answered with no text"),
        (said(None, "content_filter"), r"answered with no text \('content_filter'\)"),
        (said("a cat that", "length"), "cut off after 250 tokens"),
    ],
)
def test_errors_of_the_server_come_through(answer: Answer, message: str) -> None:
    """A refusal, a page, a busy server, nonsense, an empty or a cut answer: each is told in the server's words."""
    with serving(lambda *_: answer) as url, pytest.raises(ValueError, match=message) as caught:
        refine(endpoint_at(url), "a cat", "t2v")
    assert "secret-key" not in str(caught.value)


def test_a_busy_server_is_asked_again() -> None:
    """Two refusals that pass, then an answer."""
    answers = [Answer(429, b"{}"), Answer(500, b"{}"), said("a cat sits")]
    with serving(lambda *_: answers.pop(0)) as url:
        assert refine(endpoint_at(url), "a cat", "i2v") == "a cat sits"
    assert not answers


def test_nobody_there_is_told() -> None:
    """The address and the reason."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"language model at {url}/v1 cannot be reached: .*refused"):
            refine(endpoint_at(url), "a cat", "t2v")


@pytest.mark.parametrize("answer", ["lots", "12", "0", "between 3 and 5", "-"])
def test_a_motion_score_is_a_number_in_range(answer: str) -> None:
    """Anything else is refused, not guessed at."""
    with serving(lambda *_: said(answer)) as url, pytest.raises(ValueError, match="not a number from 1 to 10"):
        choose_motion(endpoint_at(url), "a cat")
