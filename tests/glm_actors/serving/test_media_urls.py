"""Media by URL: nothing is fetched unless its host is allowed, and then it is what the same bytes
inline would be.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from glm_batch.glm_actors.serving.openai.api_errors import ApiError
from glm_batch.glm_actors.serving.openai.prompter import RequestPrompter
from glm_batch.jobs.serving.serve_config import check_settings, load_settings
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.prompt import Prompt
from glm_batch.models.request_limits import RequestLimits
from tests.glm_actors.serving.conftest import MODEL, TINY
from tests.glm_actors.serving.test_server import picture

IMAGE = picture()[0]


class Handler(BaseHTTPRequestHandler):
    """A picture at /picture, nothing at /missing, and a redirect to another host at /away."""

    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.path)
        status = {"/picture": 200, "/away": 302}.get(self.path, 404)
        self.send_response(status)
        if status == 302:
            self.send_header(
                "Location", f"http://localhost:{self.server.server_address[1]}/picture"
            )
        self.send_header("Content-Length", str(len(IMAGE) if status == 200 else 0))
        self.end_headers()
        self.wfile.write(IMAGE if status == 200 else b"")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: tests are quiet."""


@pytest.fixture
def host() -> Iterator[str]:
    Handler.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def shown(caps: RequestLimits, *urls: str) -> Prompt:
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    prompter = RequestPrompter(TINY, caps)
    try:
        return prompter.conversation(
            [{"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]}]
        )
    finally:
        prompter.close()


def test_a_fetched_picture_is_the_inline_one(host: str) -> None:
    inline = "data:image/png;base64," + base64.b64encode(IMAGE).decode()
    caps = RequestLimits(media_private_hosts=[host])
    prompt = shown(caps, f"http://{host}/picture", inline, f"http://{host}/picture")
    assert prompt.media is not None
    assert len({item.digest for item in prompt.media.items}) == 1
    assert len(prompt.media.items) == 3
    assert Handler.seen == ["/picture"]  # once a request


@pytest.mark.parametrize(
    ("allowed", "path", "code", "message"),
    [
        ({}, "/picture", "media_forbidden", "data: URLs alone"),
        (
            {"media_hosts": ["example.org"]},
            "/picture",
            "media_forbidden",
            "hosts that this server allows",
        ),
        (
            {"media_hosts": ["{host}"]},
            "/picture",
            "media_forbidden",
            "hosts that this server allows",
        ),
        (
            {"media_private_hosts": ["{host}"]},
            "/away",
            "media_forbidden",
            "hosts that this server allows",
        ),
        ({"media_private_hosts": ["{host}"]}, "/missing", "media_not_found", "404"),
    ],
    ids=[
        "nothing allowed",
        "another host",
        "a private address",
        "a redirect to another host",
        "missing",
    ],
)
def test_what_is_not_fetched(
    host: str, allowed: dict[str, list[str]], path: str, code: str, message: str
) -> None:
    """A refusal tells nothing of addresses inside."""
    caps = RequestLimits(
        **{key: [each.format(host=host) for each in hosts] for key, hosts in allowed.items()}
    )  # type: ignore[arg-type]
    with pytest.raises(RowError, match=message) as caught:
        shown(caps, f"http://{host}{path}")
    assert caught.value.code == code
    assert "routable" not in caught.value.message
    assert Handler.seen == ([path] if path != "/picture" else [])


def test_all_media_of_a_request_have_a_limit_together(host: str) -> None:
    with pytest.raises(ApiError, match="together"):
        shown(
            RequestLimits(media_private_hosts=[host], max_body_bytes=len(IMAGE) - 1),
            f"http://{host}/picture",
        )


def test_hosts_are_checked_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(
        yaml.safe_dump(
            {"models": {MODEL: {"model": TINY}}, "limits": {"media_hosts": ["*.example.org"]}}
        )
    )
    settings, place = load_settings(str(path))
    with pytest.raises(ConfigError, match=r"limits\.media_hosts"):
        check_settings(settings, place, insecure=True, listens=False)
