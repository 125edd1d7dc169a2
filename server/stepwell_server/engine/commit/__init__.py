"""Commits changes: the store keeps a change before it is answered.

All changes take one path, which decides whether to commit in place or on a thread, and ends the claims. It knows
the store's protocol and the stored form. It runs nothing, and answers only through callbacks.
"""
