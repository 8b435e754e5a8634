"""SGLang's server, with the key of SGLANG_API_KEY and a table of requests that does not grow.

    SGLANG_API_KEY=KEY python -m prism_megatron.rollout.sglang_server ARGUMENTS OF SGLANG

SGLang takes its key as an argument alone, which every user of the host would see; an environment
only its owner does.
"""

import os
import runpy
import sys

if __name__ == "__main__":
    # what SGLang's own processes, which import this file, are not to run
    from prism_megatron.rollout.sglang_server.requests import forget_what_is_cut_off

    forget_what_is_cut_off()
    sys.argv += ["--api-key", os.environ["SGLANG_API_KEY"]]
    runpy.run_module("sglang.launch_server", run_name="__main__")
