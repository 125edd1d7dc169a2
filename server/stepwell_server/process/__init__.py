"""The server as a process: what it takes of the system, what ends it, and how it is.

Here belongs what the system asks or is told: limits, signals, systemd, imports, and the readiness that probes and gRPC
health tell as well. It may touch the operating system and the event loop; it knows no models, stores or calls.
"""
