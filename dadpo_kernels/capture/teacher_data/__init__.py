"""Readers of teacher data that other frameworks have written, and the import into a cache."""
