"""Which tokens end what is generated, by the configuration of a model."""

from transformers import CONFIG_MAPPING, PreTrainedConfig

from megatrain_io.models.generation_config import takes_several_ends


class OneEnd(PreTrainedConfig):
    model_type = "one_end"

    def __init__(self, eos_token_id=0, **others):
        if not isinstance(eos_token_id, int):
            raise TypeError("eos_token_id is a number")
        super().__init__(eos_token_id=eos_token_id, **others)


def test_a_configuration_that_takes_one_end_is_given_no_list(monkeypatch):
    """An export of Inkling had a list, which its own class refuses, so that nobody could load it."""
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "one_end", OneEnd)
    assert not takes_several_ends("one_end")
    assert takes_several_ends("llama")
    assert takes_several_ends("of another version")
