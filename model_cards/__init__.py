"""Templates of model cards; installed as `hf_diffusionblocks.model_cards`."""
