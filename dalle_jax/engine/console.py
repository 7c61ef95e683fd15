"""Lines for the terminal, printed by process 0 only: notes, metrics of a step, sizes, durations."""

from collections.abc import Mapping

import jax


def log(text: str) -> None:
    """Prints `text` on process 0."""
    if jax.process_index() == 0:
        print(text, flush=True)


def step_line(
    step: int, steps: int, values: Mapping[str, float], eta_s: float | None = None
) -> str:
    """`step 100/1000  loss 0.123 | 812 images/s  input wait 3%  ETA 0:12`.

    Args:
      step: number of finished steps.
      steps: number of steps in the run.
      values: name -> metric; names that begin with "perf/" are rates.
      eta_s: estimated seconds until the end of the run; None leaves them out.
    """
    metrics = [f"{k} {v:.4g}" for k, v in values.items() if not k.startswith("perf/")]
    rates = []
    for name, value in values.items():
        rate = name.removeprefix("perf/")
        if rate == "tflops_per_device":
            unit, scale = ("GFLOP", 1000) if value < 0.1 else ("TFLOP", 1)
            rates.append(f"{value * scale:.3g} {unit}/s/device")
        elif rate == "mfu_pct":
            rates.append(f"MFU {value:.1f}%")
        elif rate == "input_wait_pct":
            rates.append(f"input wait {value:.0f}%")
        elif rate.endswith("_per_s"):
            rates.append(f"{value:,.0f} {rate.removesuffix('_per_s')}/s")
    if eta_s is not None:
        rates.append(f"ETA {format_duration(eta_s)}")
    end = " | " + "  ".join(rates) if rates else ""
    return f"step {step:>{len(str(steps))}}/{steps}  " + "  ".join(metrics) + end


def format_duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def format_bytes(count: float) -> str:
    """`1.2 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
