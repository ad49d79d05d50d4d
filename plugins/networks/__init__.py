"""Networks with the plugin: one description of a decoder, emitted to TensorRT's network API, to ONNX or to torch.

May import the plugin and `runtime`.
"""
