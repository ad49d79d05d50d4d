"""A folder for PYTHONPATH: every Python process started with it watches for TensorRT-LLM. Imports nothing heavy."""
