"""Layouts for a model and GPUs by their memory and time: `prism-megatron plan`."""
