"""Runs programs over the rows of many sessions at once: all that becomes of a session, whoever asks for it.

`engine` is its face. It may touch the rules in `core` and the store's protocol; it knows neither the wire nor how
models get here. What is in its folders each of them says.
"""
