"""A decoding process that does to itself what its input names; test_decoder runs it in place of the
real one.
"""

from __future__ import annotations

import ctypes
import json
import os
import time

import numpy as np

from glm_batch.glm_actors.faults import child
from glm_batch.glm_actors.media import media_loader
from glm_batch.models.checkpoint.media_config import MediaKind
from glm_batch.models.errors import RowError
from glm_batch.models.processing.patches import Encoded, MediaPatches, as_file


def make_decode(**_: object) -> media_loader.Decode:
    leaked: list[np.ndarray] = []

    def decode(kind: MediaKind, data: Encoded, digest: str) -> MediaPatches:
        file, size = as_file(data)
        word = file.read(20).decode()
        if word == "segfault":
            ctypes.string_at(0)
        elif word == "abort":
            os.abort()
        elif word == "exit":
            os._exit(3)
        elif word == "hang":
            # keeps the interpreter's lock, as a library that never comes back does
            ctypes.PyDLL(None).sleep(60)
        elif word == "memory":
            np.ones(1 << 30, np.uint8)
        elif word == "leak":
            leaked.append(np.ones(160 << 20, np.uint8))
            raise RowError("leaked", "")
        elif word == "bug":
            raise KeyError("unforeseen")
        elif word == "environment":
            raise RowError("environment", json.dumps(dict(os.environ)))
        elif word == "nap":
            time.sleep(0.2)
        patches = np.full((4, 588), size % 251, np.uint8)
        return MediaPatches(
            kind=kind, patches=patches, grid=(1, 2, 2), digest=digest, source=(1, 28, 28)
        )

    return decode


if __name__ == "__main__":
    child.ORPHAN_GRACE_S = 0.3
    media_loader.main(make_decode)
