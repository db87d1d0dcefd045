"""The tiny checkpoints of the model tests, for the contract that engines have to keep."""

from __future__ import annotations

from tests.models.conftest import make_checkpoint

__all__ = ["make_checkpoint"]
