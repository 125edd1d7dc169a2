"""Which replica a session has, and which replicas can be reached."""
