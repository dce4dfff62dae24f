"""Samplers as Gaussian policies."""
