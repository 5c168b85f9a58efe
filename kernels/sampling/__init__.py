"""Operations on logits: edits, sampling, log-probabilities."""
