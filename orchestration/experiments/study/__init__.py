"""Experiments that are a graph of content-addressed tasks, with arms, controls and claims. The page is ``loop``."""
