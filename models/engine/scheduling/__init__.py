"""Which tokens of which sequences the next step computes. Integers in, decisions out; no torch.

May import `engine.api`. Read block_manager.py, sequence.py, scheduler.py; choice_tree.py holds what
labels share, placeholders.py which tokens take which media features.
"""
