"""Fills a teacher cache: reads and tokenizes pairs, and scores them with a local model or an inference server."""
