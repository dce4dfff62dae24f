"""Generators that are trained on their own samples (Alemohammad et al., 2307.01850). The page is ``loop``."""
