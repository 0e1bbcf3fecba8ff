"""Causal language models of transformers as the losses see them: head, hidden states, parallel wrappers."""
