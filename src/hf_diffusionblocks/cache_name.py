"""What Transformers calls the keys and values of earlier tokens: from 5.24 on `cache`, which takes the older name till 5.40."""

from inspect import signature

from transformers.masking_utils import create_causal_mask

CACHE = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"
