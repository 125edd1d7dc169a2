"""Encryption of the states in a store."""
