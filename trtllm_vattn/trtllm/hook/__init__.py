"""A folder for PYTHONPATH: its `sitecustomize` installs the adapter when a process imports TensorRT-LLM."""
