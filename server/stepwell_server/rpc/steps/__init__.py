"""Steps and resets: converts messages to changes and back, for unary calls and for the stream of frames.

It uses messages and the engine's interface. The fronts receive and send the bytes.
"""
