"""Turns a training checkpoint into what production loads."""
