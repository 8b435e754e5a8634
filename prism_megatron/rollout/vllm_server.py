"""What vLLM's workers load of this project, by --worker-extension-cls; the trainer never does.

vLLM turns the parameters of quantised layers into what its kernels take, which the model's
load_weights can't load again (a Parameter without load_qkv_weight). Its layerwise reload gives a
layer its first parameters back, keeps what arrives until that is all of the layer, converts it, and
copies the result to where the kernels and CUDA graphs look for it. Other layers load in place.
"""

import gc
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.utils import process_weights_after_loading

from prism_megatron.rollout import fused_experts, ipc_load, outer_group
from prism_megatron.rollout.weight_check import WeightCheck


class WeightExtension:
    """Weights, and their version, which vLLM itself doesn't know; made part of vLLM's Worker."""

    weight_version = -1
    weight_check = None
    outer = None

    def settle(self):
        """Take what has been loaded so far out of Python's garbage collection."""
        gc.collect()
        gc.freeze()

    def begin_load(self):
        """Before the first of new weights, of which those before may not all have come."""
        with self._converting():
            for layer in self._quantised_layers():
                # without effect unless a load was begun and not ended
                finalize_layerwise_reload(layer, self.model_config)
                initialize_layerwise_reload(layer)

    def load_ipc(self, handles, version):
        """Load from the processes that serve weights at `handles` (GPU's UUID: address)."""
        # as model_providers.backend names it
        device = torch.get_device_module(self.device)
        gpu = f"GPU-{device.get_device_properties(self.device).uuid}"
        ipc_load.receive(handles[gpu], self.device, self._load, lambda: self._end_load(version))

    def join_group(self, address, port, first_rank, world, name, backend):
        """Take part in the trainer's group as the engine's first rank or one of those after it."""
        # it may have been asked to leave the last one when it could not answer
        self.leave_group()
        rank = first_rank + self.rank
        self.outer = outer_group.join(address, port, world, rank, name, backend)

    def leave_group(self):
        """Leave the trainer's group, if this is in one."""
        group, self.outer = self.outer, None
        if group is not None:
            outer_group.leave(group)

    def load_broadcast(self, names, dtypes, shapes, version):
        """Load tensors as rank 0 of the group sends them; version is None unless they are the
        last."""
        arrived = []
        for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            outer_group.broadcast(tensor, self.outer).wait()
            arrived.append((name, tensor))
        self._load(arrived)
        if version is not None:
            self._end_load(version)

    def load_disk(self, hf_dir, version):
        """Load the safetensors files of a Hugging Face directory."""
        for file in sorted(Path(hf_dir).glob("*.safetensors")):
            with safe_open(file, "pt") as stored:
                self._load((name, stored.get_tensor(name)) for name in stored.keys())
        self._end_load(version)

    def _quantised_layers(self):
        """Those with FP8 blocks of their own."""
        return [
            layer
            for layer in self.model_runner.model.modules()
            if any(name.endswith("_scale_inv") for name, _ in layer.named_parameters(recurse=False))
        ]

    @contextmanager
    def _converting(self):
        """As vLLM is when it loads first: conversion makes tensors, and looks at the config."""
        with torch.device(self.device), set_current_vllm_config(self.vllm_config):
            yield

    def _load(self, tensors):
        """Some tensors."""
        model = self.model_runner.model
        tensors = chain.from_iterable(fused_experts.as_stored(*sent) for sent in tensors)
        if self._quantised_layers():
            # a layer keeps what came, and the memory that it came in is used again
            tensors = ((name, tensor.clone()) for name, tensor in tensors)
            with self._converting():
                model.load_weights(tensors)
        else:
            model.load_weights(tensors)
        # what they came in is used again as soon as the answer is there
        torch.accelerator.synchronize()

    def _end_load(self, version):
        """All tensors have come."""
        layers = self._quantised_layers()
        with self._converting():
            for layer in layers:
                finalize_layerwise_reload(layer, self.model_config)
            # would convert those a second time
            if not layers:
                process_weights_after_loading(
                    self.model_runner.model, self.model_config, self.device
                )
        torch.accelerator.synchronize()
        self.weight_version = int(version)

    def check_weights(self, action):
        """What WeightCheck.run finds wrong, or an empty text."""
        if self.weight_check is None:
            self.weight_check = WeightCheck(self.model_runner.model.named_parameters)
        try:
            self.weight_check.run(action)
        except RuntimeError as error:
            return [str(error)]
        return [""]

    def loaded_version(self):
        """Version of the weights in use; -1 before any load."""
        return [self.weight_version]
