"""Recorded outputs of transformers 5.19's GLM-4.1V processors, whose torch backend needs
torchvision.

`data/glm4v_processors.npz` holds the cases as JSON, the inputs, and for each output, under its name
K, the flat indices `K_idx` into pixel_values, the values `K_val` there, and the mean and standard
deviation of them all, `K_stat`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

DATA = np.load(Path(__file__).parent / "data" / "glm4v_processors.npz")
CASES: dict[str, list[dict[str, Any]]] = json.loads(str(DATA["cases"]))


def budget(case: dict[str, Any]) -> dict[str, int]:
    return {"min_pixels": case["size"]["shortest_edge"], "max_pixels": case["size"]["longest_edge"]}


def check_values(values: torch.Tensor, case: dict[str, Any], key: str) -> None:
    """Asserts that float pixel values equal the recorded ones."""
    array = values.numpy()
    assert list(array.shape) == case["shape"]
    assert array.dtype == np.float32
    np.testing.assert_allclose(
        array.reshape(-1)[DATA[f"{key}_idx"]], DATA[f"{key}_val"], rtol=0, atol=1e-6
    )
    np.testing.assert_allclose([array.mean(), array.std()], DATA[f"{key}_stat"], rtol=0, atol=1e-6)
