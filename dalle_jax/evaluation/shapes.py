"""Suite shapes: pictures for captions of the shapes grammar, ranked by CLIP and judged exactly.

Plain callables in, plain dictionaries out: `evaluation.suites` passes trained stages, tests pass
fakes. Work runs in chunks of bounded size, each reported as a line of text.

Estimates from N candidates of a prompt, for every k up to N:
  best_of k  probability that, of k random candidates, the one that CLIP scores highest is right;
             at k = 1 the share of right candidates
  oracle k   probability that at least one of k random candidates is right: the ceiling of any
             ranking
Both average over all subsets of size k in closed form (the unbiased pass@k of arXiv:2107.03374),
which has far less variance than the first k candidates alone.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from dalle_jax import chunks
from dalle_jax.data import scenes
from dalle_jax.evaluation import judge, progress
from dalle_jax.evaluation.results import Result, Row
from dalle_jax.evaluation.settings import Settings

Generate = Callable[[Sequence[str], int, int], np.ndarray]
Score = Callable[[np.ndarray, Sequence[str]], np.ndarray]
Pictures = Callable[[np.ndarray], np.ndarray]

_HALVES = {"seen": "exclude", "held_out": "only"}
_SHOWN_PROMPTS, _SHOWN_PICTURES = 4, 8


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A caption, with a scene that the renderer can draw for it."""

    scene: scenes.Scene
    half: str  # seen or held_out


def make_prompts(per_skill: int, seed: int, skills: Sequence[str] = scenes.KINDS) -> list[Prompt]:
    """per_skill seen and as many held-out prompts of each kind in `skills`, in that order.

    Distinct as far as the grammar goes: `single` has only 24 held-out captions, so that more than
    24 prompts repeat some (each with noise of its own).
    """
    prompts = []
    for kind in skills:
        for half, rule in _HALVES.items():
            rng = scenes.example_rng(seed, f"prompts {kind} {half}", 0)
            chosen, spare, captions = [], [], set()
            while len(chosen) < per_skill:
                scene = scenes.sample_scene(rng, kind, rule)
                is_new = scene.caption not in captions
                captions.add(scene.caption)
                (chosen if is_new else spare).append(Prompt(scene, half))
                if len(spare) > 10 * per_skill:
                    chosen += spare[: per_skill - len(chosen)]
            prompts += chosen
    return prompts


def suite(
    *,
    image_px: int,
    reconstruct: Pictures,
    settings: Settings,
    generate: Generate | None = None,
    score: Score | None = None,
    report: progress.Report = progress.silent,
) -> Result:
    """Success per skill by the exact judge.

    Args:
      image_px: side of the pictures, at least 32.
      reconstruct: uint8 [B, h, h, 3] to the same, through the codec or the decoder.
      settings: prompts, candidates, batch and seed. A skill's prompts do not depend on the others.
      generate: (captions, N, index of the first prompt) -> uint8 [P, N, h, h, 3] in the order of
        candidates. None measures only the judge and `reconstruct`.
      score: (uint8 [M, h, h, 3], M captions) -> [M], higher is better. None omits the ranking.
      report: called with lines of progress.

    Returns:
      The figures (fields: see cli/evaluate.py) and pictures for some prompts, best first.

    Raises:
      UsageError: if the judge is not exact at this size.
    """
    skills = settings.skills
    figures = {"judge": judge.check_accuracy(image_px, report), "skills": {}}
    prompts = make_prompts(settings.prompts_per_skill, settings.seed, skills)
    rebuilt = _judge_reconstructions(prompts, image_px, reconstruct, settings.batch)
    report(f"ceiling: {rebuilt.mean():.1%} of {len(prompts)} reconstructed scenes are right")
    judged, rows, seconds = None, [], {}
    if generate is not None:
        judged, rows, seconds = _generate_and_judge(prompts, generate, score, settings, report)
    for kind in skills:
        of_half = {
            half: [i for i, p in enumerate(prompts) if (p.scene.kind, p.half) == (kind, half)]
            for half in _HALVES
        }
        figures["skills"][kind] = _skill(of_half, rebuilt, judged)
    figures["mean"] = _mean(list(figures["skills"].values()))
    figures["seconds_per_picture"] = seconds
    return Result(figures, rows)


def best_of(right: np.ndarray, scores: np.ndarray, k: int) -> float:
    """Probability that the best-scored of k random candidates is right; see the module's text.

    Args:
      right: bool [N].
      scores: float [N]; of equal scores the earlier candidate wins, NaN is last.
      k: in [1, N].
    """
    num = len(right)
    order = np.argsort(np.where(np.isnan(scores), np.inf, -scores), kind="stable")
    # The candidate of rank r leads a subset if the other k - 1 all come after it.
    total = math.comb(num, k)
    leads = [math.comb(num - 1 - rank, k - 1) / total for rank in range(num)]
    return float(np.dot(leads, right[order]))


def any_of(right: np.ndarray, k: int) -> float:
    """Probability that at least one of k random candidates is right; bool [N], k in [1, N]."""
    num, wrong = len(right), int((~right).sum())
    return 1 - math.comb(wrong, k) / math.comb(num, k)


def powers(candidates: int) -> list[int]:
    """1, 2, 4, … up to and including `candidates`."""
    values = [2**i for i in range(candidates.bit_length()) if 2**i <= candidates]
    return values if values[-1] == candidates else [*values, candidates]


def _judge_reconstructions(prompts, image_px, reconstruct, batch) -> np.ndarray:
    """Bool [P]: whether the rendered scene is still right after `reconstruct`."""
    right = []
    for start in range(0, len(prompts), batch):
        part = [prompt.scene for prompt in prompts[start : start + batch]]
        images = np.stack([scenes.render(scene, image_px) for scene in part])
        for scene, image in zip(part, np.asarray(reconstruct(images)), strict=True):
            right.append(judge.judge(scene, image)["all"])
    return np.array(right)


@dataclasses.dataclass
class _Judged:
    """All candidates: their verdicts [P, N], `right` bool [P, N], scores [P, N] or None."""

    verdicts: list[list[dict[str, bool]]]
    right: np.ndarray
    scores: np.ndarray | None


def _generate_and_judge(prompts, generate, score, settings, report):
    num = settings.candidates
    size = min(len(prompts), max(1, settings.batch // num))
    timer = progress.Clock("generate and judge", len(prompts) * num, report)
    verdicts, scores, rows, times = [], [], [], []
    shown: dict[tuple, int] = {}
    for indices, count in chunks.rows(len(prompts), size):
        captions = [prompts[i].scene.caption for i in indices]
        start = time.monotonic()
        images = np.asarray(generate(captions, num, int(indices[0])))[:count]
        generated = time.monotonic()
        part_scores = [None] * count
        if score is not None:
            flat = images.reshape(-1, *images.shape[2:])
            part_scores = np.asarray(score(flat, np.repeat(captions[:count], num).tolist()))
            part_scores = part_scores.reshape(count, num)
            scores.append(part_scores)
        times.append((generated - start, time.monotonic() - generated, count))
        for i, pictures, ranks in zip(indices, images, part_scores, strict=False):
            prompt = prompts[i]
            verdicts.append([judge.judge(prompt.scene, picture) for picture in pictures])
            group = (prompt.scene.kind, prompt.half)
            shown[group] = shown.get(group, 0) + 1
            if shown[group] <= _SHOWN_PROMPTS:
                rows.append(_row(prompt, pictures, ranks, verdicts[-1]))
        timer.add(count * num)
    right = np.array([[verdict["all"] for verdict in row] for row in verdicts])
    judged = _Judged(verdicts, right, np.concatenate(scores) if scores else None)
    return judged, rows, _seconds_per_picture(times, size, num)


def _seconds_per_picture(times, size: int, candidates: int) -> dict[str, float]:
    """N -> seconds to generate and rank N candidates for one prompt.

    N times one candidate's share of the median chunk, without the first chunk, which compiles. One
    candidate needs no ranking.
    """
    times = times[1:] or times
    # A chunk that was filled up takes as long to generate as a full one.
    generate = float(np.median([seconds for seconds, _, _ in times])) / (size * candidates)
    rank = float(np.median([seconds / n for _, seconds, n in times])) / candidates
    return {str(k): k * (generate + (rank if k > 1 else 0)) for k in powers(candidates)}


def _row(prompt: Prompt, images, scores, verdicts) -> Row:
    order = range(len(images)) if scores is None else np.argsort(-scores, kind="stable")
    order = list(order)[:_SHOWN_PICTURES]
    labels = tuple(
        ("right" if verdicts[i]["all"] else "wrong")
        + ("" if scores is None else f" {scores[i]:.3f}")
        for i in order
    )
    title = f"{prompt.scene.caption} ({prompt.half.replace('_', '-')})"
    return Row(title, images[order], labels)


def _skill(of_half: dict[str, list[int]], rebuilt: np.ndarray, judged: _Judged | None) -> dict:
    figures = {"n": len(of_half["seen"])}
    prefixes = {"seen": "", "held_out": "held_out_"}
    if judged is not None:
        figures |= {half: float(judged.right[i].mean()) for half, i in of_half.items()}
        ks = powers(judged.right.shape[1])
        for half, indices in of_half.items():
            right = judged.right[indices]
            scores = np.zeros(right.shape) if judged.scores is None else judged.scores[indices]
            figures[f"{prefixes[half]}best_of"] = {
                str(k): float(
                    np.mean([best_of(*pair, k) for pair in zip(right, scores, strict=True)])
                )
                for k in (ks if judged.scores is not None else [1])
            }
            figures[f"{prefixes[half]}oracle"] = {
                str(k): float(np.mean([any_of(row, k) for row in right])) for k in ks
            }
        verdicts = [v for i in of_half["seen"] for v in judged.verdicts[i]]
        figures["conditions"] = {
            name: float(np.mean([v[name] for v in verdicts]))
            for name in verdicts[0]
            if name != "all"
        }
    for half, indices in of_half.items():
        figures[f"{prefixes[half]}reconstruction"] = float(rebuilt[indices].mean())
    return figures


def _mean(skills: list[dict]) -> dict:
    """The mean over skills of every figure that all of them have."""
    result = {}
    for name, value in skills[0].items():
        if isinstance(value, dict) and name != "conditions":
            result[name] = {k: float(np.mean([s[name][k] for s in skills])) for k in value}
        elif isinstance(value, float):
            result[name] = float(np.mean([skill[name] for skill in skills]))
    return result
