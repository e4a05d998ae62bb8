"""What a model is worth: likelihood and generated text."""
