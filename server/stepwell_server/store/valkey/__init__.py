"""The store that several servers share: a Valkey server, one with replicas that Sentinels watch, or a Cluster."""
