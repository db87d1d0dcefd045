"""Sweeps: many jobs over the same rows, run together on one set of replicas, and the table of what they came to.

A cell is one job of a sweep, with its own output. Cells of one model run as one pipeline: a row range is read once for
all cells that ask about it, and their prompts meet in the same engines' caches.
"""
