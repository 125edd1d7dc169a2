"""What speaks to the network: accepts connections, reads requests as bytes, writes replies.

All bodies have one face, `base`. A body may touch the network and the types of its library, which no other module
sees; it knows nothing of messages, sessions or the engine.
"""
