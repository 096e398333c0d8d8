"""Metrics, protocols and baselines; whatever scores is one `Scorer`."""
