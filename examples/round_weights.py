"""Round a checkpoint's matrices to few bits, as weight-only quantization does:
`examples/round_weights.py IN OUT`.

What does rounding cost? Each row of a matrix inside the layers is cut into groups, and a group
keeps `--bits` of each weight: whole multiples, to nearest, of (largest - smallest) / (2^bits - 1)
from its smallest. Embeddings, head, convolutions, norms and biases stay. Stored as bf16, so that
anything that reads IN reads OUT; the same every time.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LAYERS = (".layers.", ".blocks.")


def rounded(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """[rows, columns] with at most 2^bits values in each `group` columns; the type stays."""
    groups = weight.float().reshape(len(weight), -1, group)
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    return (low + step * ((groups - low) / step).round()).reshape(weight.shape).to(weight.dtype)


def round_checkpoint(source: Path, target: Path, bits: int, group: int) -> int:
    """Writes a checkpoint whose weights are rounded, other files as they are. Returns how many
    weights were rounded.
    """
    target.mkdir(parents=True, exist_ok=True)
    count = 0
    for path in sorted(file for file in source.iterdir() if file.is_file()):
        if path.suffix != ".safetensors":
            shutil.copyfile(path, target / path.name)
            continue
        weights = load_file(path)
        for name, weight in weights.items():
            if weight.dim() == 2 and any(part in name for part in LAYERS):
                weights[name] = rounded(weight, bits, group)
                count += weight.numel()
        save_file(weights, target / path.name, {"format": "pt"})
    return count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=32)
    args = parser.parse_args()
    count = round_checkpoint(args.source, args.target, args.bits, args.group)
    print(
        f"{args.target}: {count:,} weights rounded to {args.bits} bits, in groups of {args.group}"
    )


if __name__ == "__main__":
    main()
