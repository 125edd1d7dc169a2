"""The gRPC side: convert, delegate to the engine, convert back. The only package that knows the wire.

It may touch the engine's face, and that of who loads models. It owns the messages and statuses of errors, and no state of
sessions.
"""
