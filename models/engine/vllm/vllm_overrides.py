"""What of vLLM's own is replaced in this process: GLM-4.1V's processor, and the tokens that
constraints see.

vLLM would run the published processors on pictures of the largest size to learn how many tokens
they take.
"""

from __future__ import annotations

from collections.abc import Mapping

from vllm import ModelRegistry
from vllm.model_executor.models.glm4_1v import (
    Glm4vDummyInputsBuilder,
    Glm4vForConditionalGeneration,
    Glm4vMultiModalProcessor,
    Glm4vProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.v1.structured_output.backend_guidance import GuidanceBackend

from glm_batch.models.engine.decoding.constraints import ll_tokenizer


class OwnProcessingInfo(Glm4vProcessingInfo):  # type: ignore[misc]  # vllm has no types here
    """As many images and videos as fit; each may fill the context."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None, "video": None}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        return {modality: seq_len for modality, count in mm_counts.items() if count}


@MULTIMODAL_REGISTRY.register_processor(
    Glm4vMultiModalProcessor, info=OwnProcessingInfo, dummy_inputs=Glm4vDummyInputsBuilder
)
class OwnGlm4v(Glm4vForConditionalGeneration):  # type: ignore[misc]  # vllm has no types here
    """The same network."""


def register() -> None:
    """From now on this process's engines build OwnGlm4v."""
    ModelRegistry.register_model("Glm4vForConditionalGeneration", OwnGlm4v)


class OwnGuidance(GuidanceBackend):  # type: ignore[misc]  # vllm has no types here
    """Masks allow what TorchEngine's allow: any of the end ids where a text may end, and no control
    token inside.

    `tokenizer` is a models.processing.tokenizer.Tokenizer.
    """

    def __post_init__(self) -> None:
        self.disable_any_whitespace = self.disable_additional_properties = False
        self.ll_tokenizer = ll_tokenizer(self.tokenizer, self.vocab_size)
