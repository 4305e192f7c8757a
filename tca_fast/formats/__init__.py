"""Checkpoint formats, one module each, and the way from one to another."""
