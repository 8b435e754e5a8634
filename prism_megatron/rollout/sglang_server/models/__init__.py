"""Models that replace SGLang's of the same names, by SGLANG_EXTERNAL_MODEL_PACKAGE.

Each process that runs a model imports this, and nothing else of this project.
"""

from prism_megatron.rollout.sglang_server.memory import wait_before_pause

wait_before_pause()
