"""A deterministic simulation of replicas on one store: see `schedule`."""
