"""What vLLM's workers load of this project, by --worker-extension-cls; the trainer never does."""

import gc
from pathlib import Path

import torch
from checkpoint_engine.worker import VllmColocateWorkerExtension
from safetensors import safe_open
from vllm.model_executor.model_loader.utils import process_weights_after_loading

from prism_megatron.rollout import outer_group
from prism_megatron.rollout.weight_check import WeightCheck


class WeightExtension(VllmColocateWorkerExtension):
    """Weights from checkpoint-engine's protocol, and the version that vLLM itself doesn't know."""

    weight_version = -1
    weight_check = None
    outer = None

    def settle(self):
        """Take what has been loaded so far out of Python's garbage collection."""
        gc.collect()
        gc.freeze()

    def load_ipc(self, handles, version):
        """Load from the processes that serve weights at `handles` (GPU's UUID: address)."""
        self.update_weights_from_ipc(handles)
        self.weight_version = int(version)

    def join_group(self, address, first_rank, world, name, backend):
        """Take part in the trainer's group as the engine's first rank or one of those after it."""
        rank = first_rank + self.rank
        self.outer = outer_group.join(address, world, rank, name, backend)

    def load_broadcast(self, names, dtypes, shapes, version):
        """Load tensors as rank 0 of the group sends them; version is None unless they are the
        last."""
        arrived = []
        for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            torch.distributed.broadcast(tensor, src=0, group=self.outer)
            arrived.append((name, tensor))
        self._load(arrived, version)

    def load_disk(self, hf_dir, version):
        """Load the safetensors files of a Hugging Face directory."""
        for file in sorted(Path(hf_dir).glob("*.safetensors")):
            with safe_open(file, "pt") as stored:
                self._load(((name, stored.get_tensor(name)) for name in stored.keys()), None)
        self._load((), version)

    def _load(self, tensors, version):
        """Some tensors; version is None unless they are the last."""
        self.model_runner.model.load_weights(tensors)
        if version is not None:
            process_weights_after_loading(self.model_runner.model, self.model_config, self.device)
            self.weight_version = int(version)
        # what they came in is used again as soon as the answer is there
        torch.accelerator.synchronize()

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
