"""A checkpoint directory as data: its configuration, media processors, digest, and its tensors as a
stream.

May import `models.errors`. Read model_config.py first (what defines a network), then
config_reader.py (where each value comes from), media_config.py (how pictures and clips are
prepared) and weights.py.
"""
