"""What a model has: its rows, the replies it remembers, its record.

Plain data and the ways to read and write it. It knows neither passes nor stores.
"""
