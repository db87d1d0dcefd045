"""Ray actors around the engine and around media.

ray_private.py holds all private names of Ray. Rooms, each of which may import those before it:
`faults`, `engines`, `media`, `shared`, `units`, `serving`. `models` may be imported everywhere
here. Read units/model_actor.py first.
"""
