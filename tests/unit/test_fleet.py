"""A fleet that can't be built says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from prism_megatron.config import schema
from prism_megatron.rollout import fleet


@pytest.mark.parametrize("kind", ["local", "sglang"])
def test_engines_outside_of_the_ranks_need_ray(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(fleet, "find_spec", lambda name: None)
    config = schema.Rollout.model_validate({"kind": kind, "gpus": (0,)})
    with pytest.raises(
        ValueError, match=rf"rollout.kind={kind} needs Ray; pip install '.*\[ray\]'"
    ):
        fleet.build(config, cast(Any, None), Path("model"), seed=1, logs=Path("logs"))
