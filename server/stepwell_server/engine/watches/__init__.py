"""Watches: report the changes of sessions to others than their callers.

A watch sees a change when the store has it. It copies only what it reports, and its queue is bounded, so that a slow reader
misses events and delays no session.
"""
