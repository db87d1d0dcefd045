"""Enclosure: a Ray cluster of our own listens on this machine alone, and answers nobody but this
user.

Owns where its processes listen and the token that Ray asks of whoever calls them. Knows nothing of
jobs. A cluster that others started has settings of its own.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glm_batch.glm_actors.ray_private import ALONE, NODE_ADDRESS

LOOPBACK = "127.0.0.1"
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@contextmanager
def enclosed() -> Iterator[dict[str, Any]]:
    """Options for `ray.init`, which belongs inside. Ray reads the environment as it is imported, so
    enter it before.

    Ray itself turns tokens on for a cluster that `ray.init` starts, unless RAY_AUTH_MODE says
    otherwise.
    """
    _have_token()
    before = os.environ.get(ALONE)
    # Ray's processes inherit it; whatever else this process starts must not
    os.environ[ALONE] = "0"
    try:
        yield {NODE_ADDRESS: LOOPBACK}
    finally:
        del os.environ[ALONE]
        if before is not None:
            os.environ[ALONE] = before


def _have_token() -> None:
    """A token where Ray looks for it, for this user's eyes alone: Ray would let everybody read what
    it writes.
    """
    if any(name in os.environ for name in TOKEN_VARIABLES):
        return
    try:
        path = Path.home() / ".ray" / "auth_token"
        if not path.exists():
            _write_once(path, secrets.token_hex(32))
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except (
        OSError,
        RuntimeError,
    ):  # no home, or none to write to: this cluster has a token that no file holds
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _write_once(path: Path, text: str) -> None:
    """The whole file or none, and the first of several writers wins."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=path.parent)  # mode 600
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        os.unlink(draft)
