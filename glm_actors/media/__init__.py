"""Cells of media columns to patches: where bytes may come from, how they are fetched, and decoding
in a process apart.

May import `models`. Read media_loader.py (with the decoder), media_source.py, fetcher.py.
"""
