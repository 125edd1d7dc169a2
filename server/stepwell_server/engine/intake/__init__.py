"""Takes changes in: they wait in their model's inbox, are checked, claim their sessions and become jobs.

Changes that wait for a session or for rows are queued here too. It may use claims, rows and jobs. It runs nothing
and knows no transport.
"""
