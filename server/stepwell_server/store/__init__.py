"""Stores keep the sessions that are not in the arena.

`base` is the interface that the engine uses, and `record` is the stored form of a session. The engine knows nothing
else in here. `memory`, `disk` and `valkey` are the stores. They know neither the engine nor the network front.
"""
