"""A run and its checkpoints use nothing that jax, flax, optax or orbax have deprecated.

pytest turns every warning into an error (setup.cfg). Orbax reports deprecated calls elsewhere: by
log records of `absl`, which the package silences, and by monitoring events of jax.
"""

import contextlib
import logging
import re
import warnings

import jax
import jax.monitoring
import linear_task as lt
import orbax.checkpoint as ocp
import pytest

from dalle_jax.engine import checkpoint, loop


@contextlib.contextmanager
def deprecations(caplog):
    """A list that gets the text of every deprecation reported within."""
    reports: list[str] = []

    def listen(event, *args, **kwargs):
        if "deprecat" in event.lower():
            reports.append(event)

    with (
        caplog.at_level(logging.DEBUG, "absl"),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        caplog.clear()
        jax.monitoring.register_event_listener(listen)
        try:
            yield reports
        finally:
            jax.monitoring.unregister_event_listener(listen)
    reports += [r.getMessage() for r in caplog.records if "deprecat" in r.getMessage().lower()]
    reports += [str(w.message) for w in caught if "deprecat" in w.category.__name__.lower()]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *a: one)


@pytest.mark.parametrize("optimiser", ["adamw", "muon", "adafactor"])
def test_training_resuming_exporting_and_loading_use_nothing_deprecated(workdir, caplog, optimiser):
    with deprecations(caplog) as reports:
        for steps in (3, 5):
            config = lt.make_config(**{"train.steps": steps, "optim.name": optimiser})
            program = loop.prepare(config, lt.make_task())
            loop.train(program, lt.Batches(), lt.Batches(), str(workdir))
        checkpoint.load_variables(str(workdir))
        exported = str(workdir.parent / "exported")
        checkpoint.export(str(workdir), exported)
        checkpoint.load_variables(exported)
    assert not reports
    assert any(record.name == "absl" for record in caplog.records)  # it was listened to


def test_no_option_is_one_that_orbax_documents_as_deprecated(workdir, monkeypatch):
    """Of these options the documentation alone says so."""
    deprecated = re.findall(r"(\w+):\s+deprecated", ocp.CheckpointManagerOptions.__doc__)
    assert {"max_to_keep", "keep_period"} <= set(deprecated)
    used, make = set(), ocp.CheckpointManagerOptions

    def remember(**options):
        used.update(options)
        return make(**options)

    monkeypatch.setattr(ocp, "CheckpointManagerOptions", remember)
    checkpoint.Checkpointer(str(workdir), lt.make_config()).close()
    assert used and not used & set(deprecated)


def test_the_listener_hears_warnings_log_records_and_events(workdir, caplog):
    """Orbax reports the manager's legacy constructor by a log record and by an event."""
    with deprecations(caplog) as reports:
        warnings.warn("jnp.old is deprecated", DeprecationWarning, stacklevel=1)
        ocp.CheckpointManager(workdir, ocp.PyTreeCheckpointer()).close()
    assert len(reports) >= 3, reports
