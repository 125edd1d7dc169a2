"""The ways into a store and out of it: in place, by threads that write to a disk, several at once over a network."""
