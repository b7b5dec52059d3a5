"""Mends for upstream faults: one file each; `plugin.py` lists what they touch."""
