"""The write-ahead log: two segments make a `log`, and each `segment` is a file of entries, as `layout` describes them.

`pair` is the log of commits with another one for small changes; `reader` reads both from another process.
"""
