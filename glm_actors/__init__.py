"""Ray actors around the engine and around media.

Rooms, each of which may import those before it: `faults`, `engines`, `media`, `shared`, `units`,
`serving`. `models` may be imported everywhere here. Read units/model_actor.py first.
"""
