"""Plans: the true step is compiled, figures follow from one another, what fits is found."""

import dataclasses

import jax
import linear_task as lt
import pytest

from dalle_jax import config as cfg
from dalle_jax.engine import chips, loop
from dalle_jax.engine.program import Program
from dalle_jax.planning import hlo, plan, search, topology
from dalle_jax.planning.plan import Plan
from dalle_jax.types import UsageError

CHIP = chips.Chip("toy", peak_flops=1e9, hbm_bytes=2**30, hbm_bytes_per_s=1e9, clock_hz=1e9)
PARAMS = lt.D_IN * lt.D_OUT + lt.D_OUT


@pytest.fixture
def toy():
    """Eight CPU devices that pretend to be chips, so that times are known."""
    return topology.Topology("toy:8", tuple(jax.devices()), CHIP, 2**30)


def config(**overrides):
    return lt.make_config(**{"mesh.fsdp": 4} | overrides)


def make(config):
    return lt.make_task(config.data.batch)


def compile_plan(topology, *, is_quick=False, **overrides):
    run_config = config(**overrides)
    with run_config.unlocked():
        run_config.model = cfg.ConfigDict()  # a linear task has none
    return Plan.compile(run_config, make(run_config), topology, is_quick=is_quick)


def test_the_record_holds_together(toy):
    found = compile_plan(toy)
    assert found.fits and found.shortfall_gib == 0 and found.peak_gib < found.capacity_gib == 1
    assert found.params == PARAMS and found.mesh == {"data": 2, "fsdp": 4, "tensor": 1}
    # The kernel's 8 rows lie over 4 devices; its bias is on all.
    weights = (lt.D_IN // 4 * lt.D_OUT + lt.D_OUT) * 4 / plan.GIB
    assert found.params_gib == pytest.approx(weights) == found.ema_gib
    assert found.optimiser_gib == pytest.approx(2 * weights, rel=0.1)  # two moments and counts
    parts = (
        found.state_gib + found.frozen_gib + found.batch_gib
        + found.activations_gib + found.temporaries_gib
    )  # fmt: skip
    assert found.peak_gib == pytest.approx(parts)

    assert found.model_tflop_per_sample == pytest.approx(6 * lt.D_IN * lt.D_OUT / 1e12)
    # The first layer's input needs no gradient: 2 products, where the model's FLOPs count 3.
    assert found.hardware_tflop_per_sample == pytest.approx(4 * lt.D_IN * lt.D_OUT / 1e12)
    assert found.estimated_s_per_sample is None and found.basis == "floor"
    assert found.floor_s_per_sample == pytest.approx(4 * lt.D_IN * lt.D_OUT / 1e9)
    assert found.step_s == pytest.approx(found.floor_s_per_sample * 16 / 8)
    assert found.images_per_s == pytest.approx(16 / found.step_s)
    assert found.days == pytest.approx(20 * found.step_s / 86_400)
    assert found.chip_days == pytest.approx(8 * found.days)
    assert {row.axis for row in found.collectives} >= {"fsdp"}


def test_the_estimate_is_the_compilers_cycles_at_the_clock(toy, monkeypatch):
    monkeypatch.setattr(hlo, "estimated_cycles", lambda text: 3_000_000)
    found = compile_plan(toy)
    assert found.basis == "estimate" and found.step_s == pytest.approx(3e-3)
    assert found.estimated_s_per_sample == pytest.approx(3e-3 * 8 / 16)
    mfu = found.model_tflop_per_sample * 1e12 * 16 / 8 / 3e-3 / CHIP.peak_flops
    assert found.mfu_bound == pytest.approx(mfu)


def test_a_plan_compiles_the_step_that_train_runs(workdir, monkeypatch):
    """The text of the plan's step is that of the loop's."""
    texts = []
    lower = Program.lower_step

    def remember(self):
        lowered = lower(self)
        texts.append(lowered.as_text())
        return lowered

    monkeypatch.setattr(Program, "lower_step", remember)
    run_config = config(**{"train.steps": 1})
    program = loop.prepare(run_config, make(run_config))
    loop.train(program, lt.Batches(), lt.Batches(), str(workdir))
    compile_plan(topology.get("cpu:8"), **{"train.steps": 1})
    assert len(texts) == 2 and texts[0] == texts[1]


def test_a_state_that_is_too_large_is_not_compiled(toy, monkeypatch):
    monkeypatch.setattr(Program, "lower_step", None)
    found = compile_plan(dataclasses.replace(toy, capacity=100))
    assert not found.fits and found.temporaries_gib is None
    assert found.shortfall_gib == pytest.approx(found.peak_gib - 100 / plan.GIB)
    assert any("state alone" in note for note in found.notes)


def test_a_refusal_of_the_compiler_is_an_answer(toy, monkeypatch):
    def refuse(self):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (28.43G) exceeds available HBM (15.75G)"
        )

    monkeypatch.setattr(Program, "lower_step", refuse)
    found = compile_plan(toy)
    assert not found.fits and found.peak_gib == pytest.approx(28.43)
    assert found.collectives == [] and found.estimated_s_per_sample is None

    def fail(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(Program, "lower_step", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compile_plan(toy)


def test_a_quick_plan_has_the_same_memory_and_traffic(toy):
    """But for the code (0 on a CPU, whose compiler does not tell) and the call that ends it."""
    quick, full = compile_plan(toy, is_quick=True), compile_plan(toy)
    assert quick.is_quick and not full.is_quick
    assert quick.peak_gib == pytest.approx(full.peak_gib, abs=4096 / plan.GIB)
    assert quick.collectives == full.collectives != []
    assert quick.basis == "floor" and "--quick" in quick.notes[0]


def test_a_batch_that_does_not_divide_is_bad_input(toy):
    with pytest.raises(UsageError, match="data.batch=12 is not a multiple of 8.*use 8 or 16"):
        compile_plan(toy, **{"data.batch": 12})


def test_an_eval_batch_that_train_would_refuse_is_a_note(toy):
    (floor,) = compile_plan(toy).notes  # the CPU's compiler makes no estimate
    assert "times are the floor" in floor
    note, _ = compile_plan(toy, **{"data.eval_batch": 12}).notes
    assert "`train` will refuse: data.eval_batch=12" in note


def fake_compile(monkeypatch, peak):
    """`Plan.compile` of steps that need `peak(config)` of 10 GiB; returns the compiled configs."""
    seen = []

    def compile_fake(config, task, topology, is_quick=False):
        seen.append(config)
        needs = peak(config)
        values = {field.name: 0 for field in dataclasses.fields(Plan)} | dict(
            mesh={"data": 8 // config.mesh.fsdp, "fsdp": config.mesh.fsdp, "tensor": 1},
            devices=8, batch=config.data.batch, micro_batches=config.optim.accum_steps,
            peak_gib=needs, capacity_gib=10.0, fits=needs <= 10, state_gib=2.0 / config.mesh.fsdp,
            estimated_s_per_sample=1 + (config.model.remat == "full"), remat=config.model.remat,
        )  # fmt: skip
        return Plan(**values)

    monkeypatch.setattr(Plan, "compile", compile_fake)
    return seen


def dalle_config(root, **overrides):
    base = {"data.batch": 64, "mesh.fsdp": 8, "mesh.rules": "fsdp"}
    return cfg.override(cfg.load(f"{root}/configs/dalle.py:size=smoke"), base | overrides)


def nearest(config):
    failed = Plan.compile(config, None, None)
    assert not failed.fits
    return search.nearest(config, lambda config: None, None, failed)


def test_recomputation_is_tried_first(root, monkeypatch):
    fake_compile(monkeypatch, lambda c: 12 if c.model.remat == "none" else 6)
    assert nearest(dalle_config(root)).changes == {"model.remat": "full"}


def test_then_more_micro_batches_as_many_as_a_linear_law_asks_for(root, monkeypatch):
    def peak(c):
        return c.data.batch / c.optim.accum_steps * 0.5

    seen = fake_compile(monkeypatch, peak)
    found = nearest(dalle_config(root, **{"model.remat": "full"}))
    assert found.changes == {"optim.accum_steps": 4} and found.plan.peak_gib == 8
    assert len(seen) == 2  # the failure and the hit


def test_a_large_state_is_sharded_further(root, monkeypatch):
    def peak(c):
        return 40 / c.mesh.fsdp

    fake_compile(monkeypatch, peak)
    config = dalle_config(root, **{"model.remat": "full", "mesh.fsdp": 2})
    failed = dataclasses.replace(Plan.compile(config, None, None), state_gib=8.0)
    found = search.nearest(config, lambda config: None, None, failed)
    assert found.changes == {"mesh.data": -1, "mesh.fsdp": 4}


def test_nothing_fits(root, monkeypatch):
    seen = fake_compile(monkeypatch, lambda c: 11)
    assert nearest(dalle_config(root)) is None
    assert len(seen) <= 1 + search.MAX_TRIES


def test_search_stops_at_the_first_batch_that_does_not_fit(root, monkeypatch):
    fake_compile(monkeypatch, lambda c: c.data.batch / 8 / (2 if c.model.remat == "full" else 1))
    tried = list(
        search.search(
            dalle_config(root),
            lambda config: None,
            None,
            meshes=[(1, 8, 1)],
            batches=[256, 64, 128, 512],
            remats=["none", "full"],
        )
    )
    assert [(c.changes["model.remat"], c.changes["data.batch"]) for c in tried] == [
        ("none", 64), ("none", 128),
        ("full", 64), ("full", 128), ("full", 256),
    ]  # fmt: skip
    # Of those that fit, 64 without recomputation is the fastest and with it the smallest.
    best = search.pareto(tried)
    assert [(c.plan.remat, c.plan.batch) for c in best] == [("none", 64), ("full", 64)]


def test_default_meshes_cover_the_devices(root):
    meshes = search.default_meshes(dalle_config(root), 8)
    assert meshes == [(1, 8, 1), (2, 4, 1), (4, 2, 1)]
    tensor = dalle_config(root, **{"mesh.rules": "fsdp_tp"})
    assert all(d * f * t == 8 for d, f, t in search.default_meshes(tensor, 8))
    assert (1, 2, 4) in search.default_meshes(tensor, 8)
