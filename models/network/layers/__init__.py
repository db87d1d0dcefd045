"""What the networks are built of. Each layer knows which checkpoint tensors, and which part of
them, it holds.

May import `models.checkpoint`. Read parallel.py (the ranks that hold one model together),
linear.py, attention.py (the plain reference) and attention_grouped.py (the same as batched
products), rope.py.
"""
