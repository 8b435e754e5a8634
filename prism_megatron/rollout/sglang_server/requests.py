"""Requests that a server forgets once they are answered.

SGLang 0.5.12 drops a request from its table when its batch answers it. One that is cut off while it
waits in the queue is answered otherwise (_handle_abort_req) and stays, images and all: with
rollout.partial a host would fill up over days.
"""

import asyncio
import functools

from sglang.srt.managers.tokenizer_manager import TokenizerManager

KEPT_SECONDS = 600
"""From the answer on: who waits for it looks in the table once, when it begins to wait."""


def forget_what_is_cut_off():
    """From now on no request stays in this process's table after its end."""
    answer = TokenizerManager._handle_abort_req

    @functools.wraps(answer)
    def answered(self, request):
        answer(self, request)
        loop = asyncio.get_running_loop()
        loop.call_later(KEPT_SECONDS, self.rid_to_state.pop, request.rid, None)

    TokenizerManager._handle_abort_req = answered
