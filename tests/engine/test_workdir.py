"""Which start may continue a workdir: what binds, what may change, what a failed start leaves."""

import linear_task as lt
import pytest

from dalle_jax.engine import checkpoint, workdir
from dalle_jax.types import UsageError

KEEPS = {checkpoint.CODEC: b"0123", checkpoint.TOKENIZER: b"pieces"}


def config(dvae="codec", **changes):
    run_config = lt.make_config(**changes)
    with run_config.unlocked():
        run_config.stages = {"dvae": dvae}
    return run_config


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def trained(folder):
    """A workdir with one checkpoint; what is in it does not matter here."""
    workdir.claim(str(folder), config(), KEEPS)
    (folder / checkpoint.CHECKPOINTS / "5").mkdir(parents=True)
    return str(folder)


def test_a_workdir_without_checkpoint_binds_nothing(folder):
    """As after a start that was refused, or that ran out of memory while it compiled."""
    workdir.claim(str(folder), config(**{"optim.lr": 9.0}), KEEPS)
    workdir.claim(str(folder), config(), {checkpoint.CODEC: b"other"})
    assert checkpoint.load_config(str(folder)).optim.lr == 0.05
    assert (folder / checkpoint.CODEC).read_bytes() == b"other"


def test_a_checkpoint_binds_the_config(trained):
    with pytest.raises(UsageError, match="optim.lr: stored 0.05, given 0.1"):
        workdir.claim(trained, config(**{"optim.lr": 0.1}), KEEPS)
    workdir.claim(trained, config(**{"train.log_every_steps": 1}), KEEPS)
    assert checkpoint.load_config(trained).train.log_every_steps == 1


@pytest.mark.parametrize("name", [checkpoint.CODEC, checkpoint.TOKENIZER])
def test_another_codec_or_tokenizer_is_refused(trained, name):
    with pytest.raises(UsageError, match=f"{name} differs"):
        workdir.claim(trained, config(), KEEPS | {name: b"made again"})


def test_a_codec_may_be_moved_but_not_unseen(trained):
    workdir.claim(trained, config("elsewhere"), KEEPS)
    assert checkpoint.load_config(trained).stages.dvae == "elsewhere"
    with pytest.raises(UsageError, match="stages.dvae: stored 'elsewhere', given 'codec'"):
        workdir.claim(trained, config("codec"))
