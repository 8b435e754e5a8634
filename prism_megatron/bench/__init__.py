"""What training, sampling, weight syncs and whole steps reach: `prism-megatron bench`."""
