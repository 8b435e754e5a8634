from __future__ import annotations

from model_providers.parallel import Layout
from prism_megatron.config.schema import Parallel
from prism_megatron.training.setup import layout_of


def test_every_key_of_the_configuration_reaches_the_layout() -> None:
    sizes = dict(
        tensor=2,
        context=3,
        pipeline=5,
        virtual_pipeline=7,
        expert=11,
        expert_tensor=13,
        first_stage_layers=17,
        last_stage_layers=19,
        embedding_as_layer=True,
        loss_as_layer=True,
    )
    assert layout_of(Parallel(**sizes)) == Layout(**sizes, sequence_parallel=True)
    assert layout_of(Parallel(tensor=2, sequence=False)) == Layout(tensor=2)
    assert layout_of(Parallel()) == Layout()
