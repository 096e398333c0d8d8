"""Metrics, protocols and classical baselines; whatever scores is one `Scorer`."""
