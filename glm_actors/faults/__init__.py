"""What is done about rows that end their process, engines that hang, and where a unit's time went.

May import `models`. Read suspects.py (which row it was), child.py (work in a process apart),
watchdog.py.
"""
