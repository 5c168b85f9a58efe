"""From logits to tokens: edits, sampling, log-probabilities."""
