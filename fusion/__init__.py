"""Merging mathematics: task vectors, optimal-transport masks, every fold method. No files, sockets or clocks."""
