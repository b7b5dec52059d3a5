"""The `vllm-selfspec` command."""


def main() -> None:
    """Run the command line interface."""
    raise SystemExit("vllm-selfspec: no command is available in this build")
