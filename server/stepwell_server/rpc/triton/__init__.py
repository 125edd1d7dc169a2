"""Triton's protocol as a second way in: KServe v2 with sequences, on the same engine calls as our own."""
