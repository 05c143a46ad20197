"""A language model behind an OpenAI-compatible address: it rewrites prompts and judges how much should move."""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["t2v", "i2v", "t2i"]

DEFAULT_URL = "https://api.openai.com/v1"
DEFAULT_MODEL = "gpt-4o"
MAX_TOKENS = 250
RETRIED = (408, 429, 500, 502, 503, 504)  # states of a server that pass
MOTION_RANGE = (1, 10)

_COMMON = (
    "You turn a short request into the caption that a careful observer would write under the finished {made}. "
    "Keep every object, number, name, colour and action of the request, and invent only what it leaves open. "
    "Write plain present-tense English, one paragraph of at most {words} words, without headings, quotation marks, "
    "camera jargon or remarks to the reader. A request that is already detailed is only smoothed. "
    "If it is in another language, translate it. Answer with the caption alone."
)
INSTRUCTIONS: dict[Kind, str] = {
    "t2v": _COMMON.format(made="video", words=120)
    + " Say first who or what is seen and what happens from beginning to end, then the surroundings and the light, "
    "last where the viewer stands and whether the view moves. All of it is one shot of a few seconds.",
    "i2v": _COMMON.format(made="video", words=80)
    + " The first or last frame of the video is a given picture that you do not see: do not describe how things "
    "look beyond the request, but say which of them move, how, and whether the view moves. It is one shot.",
    "t2i": _COMMON.format(made="picture", words=100)
    + " Say first what is seen and how it is arranged, then the surroundings, the light and the style. "
    "Nothing moves in a picture, so no action goes on in time.",
}
MOTION_INSTRUCTION = (
    "You are told what a video of a few seconds shows, and answer how much moves in it: one whole number from "
    f"{MOTION_RANGE[0]} to {MOTION_RANGE[1]} and nothing else. 1: a still life, hardly a leaf stirs. 3: someone talks "
    "or breathes, water laps. 5: people walk, a car drives by. 7: running, dancing, a moving camera. 10: a race, an "
    "explosion, everything in the picture moves fast."
)


@dataclass(frozen=True)
class ChatEndpoint:
    """Where chat completions are asked for.

    Args:
        url: base of the interface, "http://localhost:8000/v1" for a server of one's own.
        retry_waits: seconds before each further attempt, where the server is busy or the connection broke.
    """

    url: str
    key: str = field(repr=False)
    model: str = DEFAULT_MODEL
    timeout_seconds: float = 60.0
    retry_waits: tuple[float, ...] = (1.0, 5.0)

    @classmethod
    def from_environment(cls, where: str, environment: Mapping[str, str] = os.environ) -> ChatEndpoint:
        """The endpoint that OPENAI_API_KEY, OPENAI_BASE_URL and OPENAI_MODEL name.

        Args:
            where: the setting that needs it, for errors.

        Raises:
            ValueError: no key, or an address that is not http(s).

        Source: the variables of the openai package, which Open-Sora v2 uses.
        """
        key = environment.get("OPENAI_API_KEY", "").strip()
        if not key:
            raise ValueError(
                f"{where} asks a language model, and OPENAI_API_KEY is not set; set it (to any text where a server of "
                f"your own at OPENAI_BASE_URL wants none), or leave {where} out"
            )
        url = (environment.get("OPENAI_BASE_URL") or DEFAULT_URL).rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"OPENAI_BASE_URL={url!r} must begin with http:// or https://")
        return cls(url, key, environment.get("OPENAI_MODEL") or DEFAULT_MODEL)

    def ask(self, instruction: str, text: str) -> str:
        """One answer.

        Raises:
            ValueError: the server cannot be reached, refuses, or answers with nothing that can be used; with its words.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "system", "content": instruction}, {"role": "user", "content": text}],
            "temperature": 0.01,
            "top_p": 0.7,
            "max_tokens": MAX_TOKENS,
        }
        for wait in (*self.retry_waits, None):
            try:
                return self._content(self._post(body))
            except _Busy as problem:
                if wait is None:
                    raise ValueError(f"{problem} ({1 + len(self.retry_waits)} attempts)") from problem.__cause__
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _post(self, body: dict[str, Any]) -> Any:
        where = f"language model at {self.url}"
        request = urllib.request.Request(
            f"{self.url}/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_seconds) as answer:
                raw = answer.read()
        except urllib.error.HTTPError as problem:
            text = f"{where} answered {problem.code}: {_message(problem.read()) or problem.reason}"
            if problem.code in RETRIED:
                raise _Busy(text) from problem
            raise ValueError(f"{text}; check OPENAI_API_KEY and OPENAI_MODEL={self.model!r}") from problem
        except (OSError, http.client.HTTPException) as problem:
            reason = getattr(problem, "reason", problem)
            raise _Busy(f"{where} cannot be reached: {reason}; check OPENAI_BASE_URL and the network") from problem
        try:
            return json.loads(raw)
        except ValueError as problem:
            raise ValueError(f"{where} did not answer in JSON but {raw[:200]!r}; check OPENAI_BASE_URL") from problem

    def _content(self, answer: Any) -> str:
        where = f"language model {self.model!r} at {self.url}"
        try:
            choice = answer["choices"][0]
            content = choice["message"]["content"]
        except (KeyError, IndexError, TypeError) as problem:
            raise ValueError(f"{where} answered without a choice: {str(answer)[:200]}") from problem
        if choice.get("finish_reason") == "length":
            raise ValueError(f"{where} was cut off after {MAX_TOKENS} tokens; shorten the prompt: {content!r}")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"{where} answered with no text ({choice.get('finish_reason')!r}): {str(choice)[:200]}")
        return " ".join(content.split())


class _Busy(Exception):
    """Worth another attempt."""


def _message(raw: bytes) -> str:
    """What a refusal says, where it is in the usual form; else its beginning."""
    try:
        error = json.loads(raw)["error"]
    except (ValueError, KeyError, TypeError):
        return raw[:200].decode(errors="replace").strip()
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def refine(endpoint: ChatEndpoint, text: str, kind: Kind) -> str:
    """`text` as a caption in full.

    Args:
        kind: what is made of it: a video, a video with given frames, or a picture.

    Raises:
        ValueError: see `ChatEndpoint.ask`.
    """
    return endpoint.ask(INSTRUCTIONS[kind], text).strip('"')


def choose_motion(endpoint: ChatEndpoint, text: str) -> float:
    """How much should move in a video of `text`, in the units of training captions.

    Raises:
        ValueError: as `ChatEndpoint.ask`, or an answer that is no number of `MOTION_RANGE`.
    """
    answer = endpoint.ask(MOTION_INSTRUCTION, text)
    low, high = MOTION_RANGE
    match = re.fullmatch(r"\D*(\d+(?:\.\d+)?)\.?", answer)
    if match is None or not low <= float(match[1]) <= high:
        raise ValueError(
            f"motion_score='dynamic': language model {endpoint.model!r} answered {answer[:80]!r}, not a number from "
            f"{low} to {high}; give --motion-score a number"
        )
    return float(match[1])
