"""Layers, each of which knows which part of which checkpoint tensors it holds.

May import `models.checkpoint`. Read parallel.py (the ranks that hold one model together),
linear.py, attention.py (the plain reference, and the same as batched products), rope.py.
"""
