"""The store that several servers share: a Valkey server, one with replicas that Sentinels watch, or a Cluster.

All that is asked of it is awaited. Only `connection.client` imports Valkey's client; nothing in here knows the engine.
"""
