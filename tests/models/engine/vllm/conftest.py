"""Leaves out the tests that need vLLM where it is not installed; `make test-vllm` runs them where
it is.
"""

from __future__ import annotations

from glm_batch.models.engine.vllm.vllm_limits import is_installed

NEED_VLLM = [
    "test_vllm_engine.py",
    "test_vllm_jobs.py",
    "test_vllm_media.py",
    "test_vllm_serving.py",
]
collect_ignore = [] if is_installed() else NEED_VLLM
