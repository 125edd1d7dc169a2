"""What happened is kept by the store before anybody hears of it.

One commit for every change; it decides by itself whether it is made in place or by a thread, and ends the claims. It
knows the store's protocol and the stored form; it runs nothing and answers nobody but by the callback it was given.
"""
