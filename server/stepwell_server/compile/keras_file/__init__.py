"""The ``.keras`` file: whether it is one, what it holds, and where it comes from."""
