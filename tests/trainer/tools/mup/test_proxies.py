"""A proxy is the config at another width and nothing else."""

from dataclasses import replace

import pytest

from tandem.trainer.config import UserError
from tandem.trainer.tools.mup.proxies import proxy_config
from tests import tiny_configs


def test_only_width_and_ffn_width_change_so_that_head_dim_grows():
    config = tiny_configs.make_config("btlm")
    wide = proxy_config(config, 512)
    assert (wide.model.hidden_size, wide.model.ffn_hidden_size) == (512, 8 * config.model.ffn_hidden_size)
    assert (wide.model.num_heads, wide.model.head_dim) == (config.model.num_heads, 8 * config.model.head_dim)
    assert replace(wide.model, hidden_size=64, ffn_hidden_size=170) == config.model
    assert (wide.mup, wide.schedule, wide.optim) == (config.mup, config.schedule, config.optim)


def test_at_the_configs_own_width_it_is_the_config():
    config = tiny_configs.make_config("btlm", data={"prefetch_steps": 0})
    assert proxy_config(config, config.model.hidden_size) == config


@pytest.mark.parametrize(("width", "tp_size", "field"), [(66, 1, "model.num_heads"), (64, 8, "parallel.tp_size 8")])
def test_a_width_that_does_not_fit_is_refused_in_the_words_of_the_config(width, tp_size, field):
    with pytest.raises(UserError, match=rf"--widths {width}: model\..*{field}"):
        proxy_config(tiny_configs.make_config("btlm"), width, tp_size=tp_size)
