"""What `vllm-selfspec bench` measures, with whom it compares, and how it tells."""
