"""Runs programs over the rows of many sessions at once."""
