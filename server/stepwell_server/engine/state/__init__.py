"""What a model keeps: its rows, remembered replies and record fields.

Plain data, and functions that read and write it. It knows neither passes nor stores.
"""
