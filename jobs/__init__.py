"""The command line `glm-batch`.

Rooms, each of which may import those before it: `files`, `checks`, `display`, `plans`, `commands`,
and the optional `openai_batch`, `report`, `calibration`, `cron`, `sweep`, `serving`, `demo`.
Imports neither torch nor Ray. Read __main__.py, then commands/label.py.
"""
