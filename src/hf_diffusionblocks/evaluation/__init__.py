"""What a model is worth: likelihood, generated text, pictures; and where its noise should be."""
