"""Autoregressive text."""
