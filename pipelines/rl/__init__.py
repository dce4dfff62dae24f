"""A diffusion model that is sampled as a policy and trained by its rewards."""
