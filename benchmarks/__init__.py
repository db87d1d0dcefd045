"""Reproducible comparisons with peers. Nothing in the product imports this package; it is not
installed with it.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "benchmarks"
