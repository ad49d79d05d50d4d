"""Networks that hold the plugin: one description of a decoder, and who draws it: TensorRT's network API, ONNX, torch.

May import the plugin and `runtime`.
"""
