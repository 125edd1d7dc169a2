"""Copies of a store: a `snapshot` of all that it has, the `file` of a backup, and a `new_store` made from either."""
