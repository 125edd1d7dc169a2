"""A change is kept by the store before it is answered.

One commit for every change; it decides by itself whether it is made in place or by a thread, and ends the claims. It
knows the store's protocol and the stored form; it runs nothing, and answers only by the callback that it was given.
"""
