"""A finished output as table files that other programs read. Optional.

May import `output` and `report`. Read table_files.py.
"""
