"""Steps on the wire: messages to changes and back, the unary call and the stream of frames.

It may touch messages and the engine's face; how bytes come and go is the front's affair.
"""
