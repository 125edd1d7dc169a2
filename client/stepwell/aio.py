"""The async client: to come."""
