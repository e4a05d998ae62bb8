"""The mathematics of diffusion over blocks: no model in it."""
