"""The gRPC side: converts requests, delegates to the engine, converts the results. Only this package knows the protocol.

It uses the interfaces of the engine and of the catalog of models. It owns the texts and statuses of errors, and no state of
sessions.
"""
