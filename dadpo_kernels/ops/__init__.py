"""From hidden states and a head to log-probabilities: the primitive, its plans and backends. Needs torch alone."""
