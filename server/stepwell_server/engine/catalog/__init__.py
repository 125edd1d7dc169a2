"""Changes of versions: one is loaded, becomes the default, takes sessions along, and is unloaded.

It may touch everything else in the engine. Which files versions come from is not its affair.
"""
