"""Steps of many sessions as few messages."""
