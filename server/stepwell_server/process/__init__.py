"""The server as a process of the operating system: limits, signals, systemd, garbage collection, and its readiness.

Probes, gRPC health and systemd report the same readiness. This package may use the operating system and the event loop; it
knows no models, stores or calls.
"""
