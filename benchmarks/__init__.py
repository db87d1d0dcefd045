"""Reproducible comparisons with peers. Nothing in the product imports this package; it is not installed with it."""
