"""The engine's vocabulary: Request, Completion, EngineConfig and the protocols that every engine
follows.

May import `models.checkpoint` and `models.processing`; no torch. Read request.py, then
interface.py.
"""
