"""Streamed layers: the exact gradient of any stock model, in the memory of a layer or two. Nothing here knows of diffusion."""

from .layer_streaming import LayerStream, stream_layers, stream_of
from .lending import weights_on_device
from .stream import counting_once

__all__ = ["LayerStream", "counting_once", "stream_layers", "stream_of", "weights_on_device"]
