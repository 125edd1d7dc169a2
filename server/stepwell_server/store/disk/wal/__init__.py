"""The write-ahead log: two segments make a `log`, and each `segment` is a file of entries, as `layout` describes them.

`reader` reads it from another process.
"""
