"""The sub-commands of `vllm-selfspec`, one module each, imported only when the command is run."""
