"""Judges that take no part in training: distances, features, the evaluator."""
