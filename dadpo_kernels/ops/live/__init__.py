"""The live plan: exact on the columns that matter, rank one on the others, with a certificate. See docs/live.md."""
