"""What a model is worth: likelihood and generated text; and where its noise should be."""
