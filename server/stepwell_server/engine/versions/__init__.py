"""Versions of a model: what is kept of them, how one becomes the default, and how sessions get to it.

It may touch everything else in the engine; which files versions come from is not its affair.
"""
