"""Tiny transformers of diffusers."""

def diffusers_model(name): raise NotImplementedError
def diffusers_batch(name): raise NotImplementedError
NAMES=()
