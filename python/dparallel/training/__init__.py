"""Certainty forcing: a model's own right answers (`trajectories`), and its training on them (`distill`)."""
