"""The client without its sync and async interface: operations, sessions, connections."""
