"""HTTP servers on this machine, for tests of what is fetched and of what a language model is asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """What a server says: `announced` bytes in its header, where that is to differ from the body's."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    announced: int | None = None


@contextmanager
def serving(answer: Callable[[str, Any], Answer]) -> Iterator[str]:
    """A server that calls `answer(path, body)`; body is the JSON of a POST, None for a GET. Yields: its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say(answer(self.path, None))

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            self._say(answer(self.path, {**json.loads(raw), "authorization": self.headers["Authorization"]}))

        def _say(self, said: Answer) -> None:
            self.send_response(said.status)
            self.send_header("Content-Type", said.content_type)
            self.send_header("Content-Length", str(len(said.body) if said.announced is None else said.announced))
            self.end_headers()
            self.wfile.write(said.body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class LanguageModel:
    """Answers chat completions as the published interface does; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def __call__(self, path: str, body: Any) -> Answer:
        assert path == "/v1/chat/completions", path
        with self.lock:
            self.asked.append(body)
        instruction, text = (message["content"] for message in body["messages"])
        content = "7" if "whole number" in instruction else f"{text}, in full"
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        return Answer(body=json.dumps({"choices": [choice]}).encode())
