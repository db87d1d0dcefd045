"""vLLM's guidance backend over this project's own view of the tokenizer.

Knows nothing of requests and schemas.
"""

from __future__ import annotations

from vllm.v1.structured_output.backend_guidance import GuidanceBackend

from glm_batch.models.engine.decoding.constraints import ll_tokenizer


class OwnGuidance(GuidanceBackend):  # type: ignore[misc]  # vllm has no types here
    """Masks allow what TorchEngine's allow: any of the end ids where a text may end, and no control
    token inside.

    `tokenizer` is a models.processing.tokenizer.Tokenizer.
    """

    def __post_init__(self) -> None:
        self.disable_any_whitespace = self.disable_additional_properties = False
        self.ll_tokenizer = ll_tokenizer(self.tokenizer, self.vocab_size)
