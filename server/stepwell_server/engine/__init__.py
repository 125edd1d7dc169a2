"""Runs programs over the rows of many sessions at once, and manages the sessions.

`engine` is its interface. It may use the rules in `core` and the store's protocol. It knows neither the wire format
nor how models are found and compiled. Each folder's docstring describes it.
"""
