"""What vLLM's workers load of this project, by --worker-extension-cls; the trainer never does."""

import gc

from checkpoint_engine.worker import VllmColocateWorkerExtension

from prism_megatron.rollout.weight_check import WeightCheck


class WeightExtension(VllmColocateWorkerExtension):
    """Weights from checkpoint-engine's protocol, and the version that vLLM itself doesn't know."""

    weight_version = -1
    weight_check = None

    def settle(self):
        """Take what has been loaded so far out of Python's garbage collection."""
        gc.collect()
        gc.freeze()

    def load_ipc(self, handles, version):
        """Load from the processes that serve weights at `handles` (GPU's UUID: address)."""
        self.update_weights_from_ipc(handles)
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
