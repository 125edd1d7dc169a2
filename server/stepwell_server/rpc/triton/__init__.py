"""Triton's protocol as a second interface: KServe v2 with sequences, on the same engine calls as our own.

It may use what the rest of rpc may use. Sequences are names for sessions, and only this package knows of them.
"""
