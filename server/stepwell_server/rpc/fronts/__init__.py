"""The network fronts: they accept connections, read requests as bytes, and write replies.

All implementations share the interface in `base`. Each uses the network and the types of its library, which no other module
sees. A front knows nothing of messages, sessions or the engine.
"""
