"""Model files for `trtllm-build --model_cls_file`, whose attention is our plugin. Need TensorRT-LLM 1.2.x."""
