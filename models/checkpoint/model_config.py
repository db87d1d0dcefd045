"""ModelConfig: what defines one network, as frozen data.

Owns names, types and what follows from them (parameter counts, the longest context). Reading them
from a checkpoint's files is the business of models.checkpoint.config_reader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal["glm", "glm4", "glm4v"]
Head = Literal["causal_lm", "sequence_classification", "token_classification"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: `rotary_dim` leading dimensions of each head turn; the rest pass through.

    `mrope_section` deals the pairs of dimensions to the position axes time, height, width in turn;
    empty where there is one axis. The fields after `factor` belong to YaRN (arXiv 2309.00071)
    alone.
    """

    rope_type: Literal["default", "linear", "yarn"]
    rope_theta: float
    rotary_dim: int
    mrope_section: tuple[int, ...] = ()
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """The vision tower of a GLM-4.1V, with the checkpoint's own names.

    The width of a block's MLP is `out_hidden_size`; `intermediate_size` is that of the merger.
    """

    depth: int
    hidden_size: int
    num_heads: int
    in_channels: int
    image_size: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    intermediate_size: int
    attention_bias: bool
    rms_norm_eps: float
    rope_theta: float

    @property
    def frame_values(self) -> int:
        """Values of one patch of a single frame."""
        return self.in_channels * self.patch_size**2

    @property
    def grid_size(self) -> int:
        """Rows, and columns, of the learned position table."""
        return self.image_size // self.patch_size

    @property
    def num_parameters(self) -> int:
        hidden, out = self.hidden_size, self.out_hidden_size
        embeddings = (self.temporal_patch_size * self.frame_values + 1 + self.grid_size**2) * hidden
        attention = 4 * hidden * hidden + (3 * hidden if self.attention_bias else 0)
        block = attention + 3 * hidden * out + 2 * hidden
        downsample = out * hidden * self.spatial_merge_size**2 + out
        merger = out * out + 2 * out + 3 * out * self.intermediate_size
        return embeddings + self.depth * block + 2 * hidden + downsample + merger


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaTokens:
    """The ids that mark media in a prompt: each feature takes the place of one `image`.

    Those between `video_start` and `video_end` are frames of a video.
    """

    image: int
    video: int
    image_start: int
    image_end: int
    video_start: int
    video_end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One model with its head. `num_labels`, `id2label`, `problem_type` matter to classification
    heads only.

    `vision` and `media_tokens` are None where the model reads nothing but text.
    """

    architecture: str
    family: Family
    head: Head
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    attention_bias: bool
    tie_word_embeddings: bool
    rope: RopeConfig
    dtype: Literal["float32", "bfloat16", "float16"]
    pad_token_id: int | None
    eos_token_ids: tuple[int, ...]
    num_labels: int
    id2label: tuple[str, ...]
    problem_type: ProblemType | None
    token_classification_bias: bool
    vision: VisionConfig | None = None
    media_tokens: MediaTokens | None = None

    @property
    def longest_context(self) -> int:
        """The most tokens, prompt and answer together, that it was made for, or was stretched to by
        its rope.
        """
        return max(
            self.max_position_embeddings,
            int(self.rope.original_max_position_embeddings * self.rope.factor),
        )

    @property
    def inferred_problem_type(self) -> ProblemType:
        """As config.json says; else by the number of labels, as training would have inferred it."""
        if self.problem_type is not None:
            return self.problem_type
        return "regression" if self.num_labels == 1 else "single_label_classification"

    @property
    def num_parameters(self) -> int:
        """Weights of the whole network, the head included."""
        hidden, heads, kv_heads = (
            self.hidden_size,
            self.num_attention_heads,
            self.num_key_value_heads,
        )
        qkv = (heads + 2 * kv_heads) * self.head_dim
        attention = (
            qkv * hidden + heads * self.head_dim * hidden + (qkv if self.attention_bias else 0)
        )
        norms = (2 if self.family == "glm" else 4) * hidden
        layer = attention + 3 * hidden * self.intermediate_size + norms
        total = self.num_hidden_layers * layer + self.vocab_size * hidden + hidden
        total += self.vision.num_parameters if self.vision else 0
        if self.head == "causal_lm":
            return total + (0 if self.tie_word_embeddings else self.vocab_size * hidden)
        bias = self.head == "token_classification" and self.token_classification_bias
        return total + self.num_labels * hidden + (self.num_labels if bias else 0)
