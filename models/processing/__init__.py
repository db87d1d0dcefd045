"""Conversations to what the engine takes, its numbers to what people read. CPU only, no torch.

May import `models.checkpoint`. Read messages.py, chat.py (templates), tokenizer.py, images.py and
video.py (bytes to patches), positions.py, tool_messages.py, and prompt.py, which joins them.
"""
