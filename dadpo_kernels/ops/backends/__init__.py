"""What happens inside a tile of the vocabulary, one module a backend; `registry` picks one."""
