"""Stepwell's server: one recurrent state per session, advanced exactly once per step."""
