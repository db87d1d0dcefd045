"""Which tokens of which sequences the next step computes. Integers in, decisions out; no torch.

May import `engine.api`. Read block_manager.py, sequence.py (with the tree of what labels share),
scheduler.py; placeholders.py says which tokens take which media features.
"""
