"""ModelConfig: what defines one network, as frozen data, and what follows from it.

That are the tensors which a checkpoint stores, parameter counts, and the longest context.
"""

from __future__ import annotations

import math
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
        return sum(map(math.prod, self.tensor_shapes("").values()))

    def tensor_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """What a checkpoint stores of the tower, whose names begin with `name`."""
        hidden, out, merge = self.hidden_size, self.out_hidden_size, self.spatial_merge_size
        patch = (self.in_channels, self.temporal_patch_size, self.patch_size, self.patch_size)
        shapes: dict[str, tuple[int, ...]] = {
            "embeddings.position_embedding.weight": (self.grid_size**2, hidden),
            "patch_embed.proj.weight": (hidden, *patch),
            "patch_embed.proj.bias": (hidden,),
            "post_conv_layernorm.weight": (hidden,),
            "post_layernorm.weight": (hidden,),
            "downsample.weight": (out, hidden, merge, merge),
            "downsample.bias": (out,),
            "merger.proj.weight": (out, out),
            "merger.post_projection_norm.weight": (out,),
            "merger.post_projection_norm.bias": (out,),
            "merger.gate_proj.weight": (self.intermediate_size, out),
            "merger.up_proj.weight": (self.intermediate_size, out),
            "merger.down_proj.weight": (out, self.intermediate_size),
        }
        for i in range(self.depth):
            block = f"blocks.{i}"
            shapes |= {
                f"{block}.norm1.weight": (hidden,),
                f"{block}.norm2.weight": (hidden,),
                f"{block}.attn.qkv.weight": (3 * hidden, hidden),
                f"{block}.attn.proj.weight": (hidden, hidden),
                f"{block}.mlp.gate_proj.weight": (out, hidden),
                f"{block}.mlp.up_proj.weight": (out, hidden),
                f"{block}.mlp.down_proj.weight": (hidden, out),
            }
            if self.attention_bias:
                shapes[f"{block}.attn.qkv.bias"] = (3 * hidden,)
        return {f"{name}{part}": shape for part, shape in shapes.items()}


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
    """One model with its head; the fields about labels matter to classification heads only.

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
        """The most tokens, with the answer's, that it was made for or stretched to by its rope."""
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
        return sum(map(math.prod, self.tensor_shapes().values()))

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that a checkpoint stores for the network, by name, with their shapes.

        The networks' own targets are these, which a test compares; here no torch is needed.
        """
        hidden, inner = self.hidden_size, self.intermediate_size
        rows = {
            "q_proj": self.num_attention_heads * self.head_dim,
            "k_proj": self.num_key_value_heads * self.head_dim,
            "v_proj": self.num_key_value_heads * self.head_dim,
        }
        norms = ["input_layernorm", "post_attention_layernorm"]
        if self.family != "glm":
            norms += ["post_self_attn_layernorm", "post_mlp_layernorm"]
        prefix = "model.language_model" if self.family == "glm4v" else "model"
        shapes: dict[str, tuple[int, ...]] = {
            f"{prefix}.embed_tokens.weight": (self.vocab_size, hidden),
            f"{prefix}.norm.weight": (hidden,),
        }
        for i in range(self.num_hidden_layers):
            layer = f"{prefix}.layers.{i}"
            shapes |= {f"{layer}.{norm}.weight": (hidden,) for norm in norms}
            for name, count in rows.items():
                shapes[f"{layer}.self_attn.{name}.weight"] = (count, hidden)
                if self.attention_bias:
                    shapes[f"{layer}.self_attn.{name}.bias"] = (count,)
            shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, rows["q_proj"])
            shapes[f"{layer}.mlp.gate_up_proj.weight"] = (2 * inner, hidden)
            shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        if self.head != "causal_lm":
            shapes["score.weight"] = (self.num_labels, hidden)
            if self.head == "token_classification" and self.token_classification_bias:
                shapes["score.bias"] = (self.num_labels,)
        elif not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes | (self.vision.tensor_shapes("model.visual.") if self.vision else {})
