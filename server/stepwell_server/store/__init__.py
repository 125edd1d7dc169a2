"""Where sessions are kept that are not in the arena.

`base` is what the engine asks of a store and `record` the stored form of a session: nothing else in here is known to
the engine. `memory` and `disk` are the stores. They know neither the engine nor what speaks to the network.
"""
