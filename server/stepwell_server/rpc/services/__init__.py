"""Stepwell's own services, health and reflection: convert, delegate, convert back. Triton's are in `rpc/triton`."""
