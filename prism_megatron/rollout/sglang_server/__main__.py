"""SGLang's server, with the key of SGLANG_API_KEY.

    SGLANG_API_KEY=KEY python -m prism_megatron.rollout.sglang_server ARGUMENTS OF SGLANG

SGLang takes its key as an argument alone, which every user of the host would see; an environment
only its owner does.
"""

import os
import runpy
import sys

if __name__ == "__main__":
    sys.argv += ["--api-key", os.environ["SGLANG_API_KEY"]]
    runpy.run_module("sglang.launch_server", run_name="__main__")
