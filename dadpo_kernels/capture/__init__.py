"""What fills a teacher cache: pairs are read, tokenized and scored by a model here or by an inference server."""
