"""The rounded checkpoint of the shipped sweep: few values in each group, near the old ones, the
same every time.
"""

from __future__ import annotations

from pathlib import Path

import torch
from round_weights import LAYERS, round_checkpoint, rounded
from safetensors.torch import load_file

TINY = Path(__file__).parents[2] / "examples" / "tiny_glm"


def test_each_group_keeps_few_values_near_the_old_ones() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    weight[0, :32] = 0.25  # a group without a range
    found = rounded(weight, 3, 16)
    for before, after in zip(weight.reshape(-1, 16), found.reshape(-1, 16), strict=True):
        assert len(after.unique()) <= 8
        assert (after - before).abs().max() <= (before.max() - before.min()) / 7 / 2 + 1e-6
        torch.testing.assert_close(
            torch.stack([after.min(), after.max()]), torch.stack([before.min(), before.max()])
        )


def test_matrices_of_layers_alone_are_rounded_and_always_the_same(tmp_path: Path) -> None:
    count = round_checkpoint(TINY, tmp_path / "a", 4, 32)
    round_checkpoint(TINY, tmp_path / "b", 4, 32)
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert files.keys() == {path.name for path in TINY.iterdir()}
    before, after = (load_file(folder / "model.safetensors") for folder in (TINY, tmp_path / "a"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        name for name in before if before[name].dim() == 2 and any(part in name for part in LAYERS)
    }
    assert count == sum(before[name].numel() for name in changed)
    assert all(weight.dtype == before[name].dtype for name, weight in after.items())
