"""Connections to Valkey: the `url` of a store, the `client`, the `nodes` that it finds, and the `requests` sent to them."""
