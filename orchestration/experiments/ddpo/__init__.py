"""Reinforcement learning of a diffusion model (Black et al., 2305.13301). The page is ``loop``."""
