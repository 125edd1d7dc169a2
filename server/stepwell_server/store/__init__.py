"""Where sessions are kept that are not in the arena."""
