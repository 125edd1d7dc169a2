"""Reads and writes of stores: in place, on threads that write to a disk, or concurrently over a network."""
