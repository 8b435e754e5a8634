"""Models that replace SGLang's of the same names, by SGLANG_EXTERNAL_MODEL_PACKAGE.

Each process that runs a model imports this, and nothing else of this project.
"""

from prism_megatron.rollout.sglang_server.memory import wait_before_pause

# SGLang takes its own model in place of one that it can't import, and says so in its log alone
from prism_megatron.rollout.sglang_server.models import qwen3_vl_moe as qwen3_vl_moe

wait_before_pause()
