"""Rules for files of any kind: private to the server's user, unchanged, safe to unpack.

This package has functions for files that several parts need. It may use the operating system; it knows nothing of
settings, models or stores.
"""
