"""Models that come and go while the server runs: loads, uploads, and what becomes of each version."""
