"""Versions of a model: what is kept of them, how one becomes the default, and how sessions get to it."""
