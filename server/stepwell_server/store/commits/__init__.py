"""How batches get into a store: in place, by threads that write to a disk, or several at once over a network."""
