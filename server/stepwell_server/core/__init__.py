"""The rules of sessions, slots and passes: no I/O, no TensorFlow, time passed in.

Nothing in here is thread-safe: everything is called from the event loop.
"""
