"""Watches: the changes of sessions, and the activity of the server, while others use them."""
