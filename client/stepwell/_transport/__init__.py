"""Channels and streams of gRPC, and what decides when a call is tried again."""
