"""Triton's protocol as a second way in: KServe v2 with sequences, on the same engine calls as our own.

It may touch what the rest of rpc may; sequences are names for sessions, and nothing else knows of them.
"""
