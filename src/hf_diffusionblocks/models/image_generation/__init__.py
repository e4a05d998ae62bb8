"""Image generation: a diffusion model of images whose blocks are denoisers of their own ranges of noise."""
