"""GLM-4.1V's text side: GLM-4-0414 under M-RoPE, with image and video features in place of some
embeddings.

Positions [3, T] and the features come with the step (models.network.glm); what is particular are
the checkpoint's names. Knows nothing of pixels: the tower that makes features from them is
models.network.vision.
"""

from __future__ import annotations

from glm_batch.models.network.glm4 import Glm4Backbone


class Glm4vBackbone(Glm4Backbone):
    """The language model of a GLM-4.1V."""

    prefix = "model.language_model"
