"""Stepwell's own services, health and reflection. Triton's services are in `rpc/triton`."""
