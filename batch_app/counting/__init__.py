"""Counting prompt tokens as the engine will, without an engine. `count.py` is the way in."""
