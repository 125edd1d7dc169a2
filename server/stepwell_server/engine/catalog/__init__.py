"""Changes of versions: loads, unloads, moves of the default, and the sessions that move with it.

It may use everything else in the engine. It does not know which files versions come from.
"""
