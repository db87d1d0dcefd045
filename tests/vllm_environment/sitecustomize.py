"""Lets a torchvision that was built for CUDA be imported beside a CPU torch; `make test-vllm` puts
this on the path.

vLLM's GLM-4.1V imports torchvision's Python code, also in a process of its own that inspects the
model. The compiled operators, which such a build cannot load, are declared and never called.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
OPERATORS = (f"nms{SCHEMA}", f"qnms{SCHEMA}")


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Declares the operators right before torchvision is imported, and steps aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            if importlib.machinery.PathFinder.find_spec(fullname, path) is not None:
                _declare()
        return None


def _declare() -> Any:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in OPERATORS:
        library.define(schema)
    KEPT.append(library)


KEPT: list[Any] = []  # a library's declarations end with it
sys.meta_path.insert(0, DeclareOperators())
