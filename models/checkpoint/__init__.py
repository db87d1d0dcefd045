"""A checkpoint directory as data: its files, configuration, digest, and its tensors as a stream.

May import `models.errors`. Read model_config.py first (what defines a network), then
config_reader.py (where each value comes from), headers.py (whether the weight files fit),
weights.py, media_config.py (how pictures and clips are prepared) and directory.py (what else than a
model a directory may be).
"""
