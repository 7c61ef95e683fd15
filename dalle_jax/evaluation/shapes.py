"""The evaluation suites: shapes (drawn, ranked, judged), reconstruction, retrieval.

Plain callables in, plain dictionaries out: `cli/evaluate.py` builds the callables from trained
stages, tests from fakes. Work goes in chunks of bounded size, each reported as a line of text.

Estimates from N candidates of a prompt, for every k up to N:
  best_of k  the chance that the candidate which CLIP scores best among k drawn at random is right;
             at k = 1 simply the share of right candidates
  oracle k   the chance that at least one of k drawn at random is right, the ceiling of any ranking
Both average over all subsets of size k in closed form (the unbiased pass@k of arXiv:2107.03374),
which has far less variance than looking at the first k only.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from dalle_jax.data import scenes
from dalle_jax.evaluation import codec, judge, progress, retrieval
from dalle_jax.types import UsageError

Generate = Callable[[Sequence[str], int, int], np.ndarray]
Score = Callable[[np.ndarray, Sequence[str]], np.ndarray]
Pictures = Callable[[np.ndarray], np.ndarray]
Report = Callable[[str], None]

MIN_ORACLE = 0.995
_HALVES = {"seen": "exclude", "held_out": "only"}
_SHOWN_PROMPTS, _SHOWN_PICTURES = 4, 8


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A caption to draw, with a scene of it that the renderer can draw too."""

    scene: scenes.Scene
    half: str  # seen or held_out


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt's pictures for the contact sheet, best first: uint8 [n, h, w, 3]."""

    prompt: Prompt
    images: np.ndarray
    labels: tuple[str, ...]


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


def shapes_suite(
    *,
    image_px: int,
    reconstruct: Pictures,
    generate: Generate | None = None,
    score: Score | None = None,
    prompts_per_skill: int = 25,
    skills: Sequence[str] = scenes.KINDS,
    candidates: int = 32,
    seed: int = 0,
    max_pictures: int = 256,
    num_oracle: int = 400,
    report: Report = lambda line: None,
) -> tuple[dict, list[Example]]:
    """Success per skill by the exact judge.

    Args:
      image_px: side of the pictures, at least 32.
      reconstruct: codec there and back, uint8 [B, h, h, 3] to the same.
      generate: (captions, N, index of the first prompt) -> uint8 [P, N, h, h, 3] in the order of
        candidates. None measures judge and codec only.
      score: (uint8 [M, h, h, 3], M captions) -> [M], higher is better. None leaves out ranking.
      prompts_per_skill: n, of each half.
      skills: some of `shapes.KINDS`; a skill's prompts are the same with or without the others.
      candidates: N per prompt.
      seed: of the prompts.
      max_pictures: drawn at a time.
      num_oracle: scenes for the judge's own accuracy.
      report: called with lines of progress.

    Returns:
      The report (see cli/evaluate.py) and pictures of some prompts.

    Raises:
      UsageError: if the judge is not exact at this size.
    """
    for name, value in (("prompts_per_skill", prompts_per_skill), ("candidates", candidates)):
        if value < 1:
            raise UsageError(f"{name} is {value}; expected at least 1.")
    judge = checked_judge(image_px, num_oracle, report)
    prompts = make_prompts(prompts_per_skill, seed, skills)
    rebuilt = _judge_reconstructions(prompts, image_px, reconstruct, max_pictures)
    report(f"ceiling: {rebuilt.mean():.1%} of {len(prompts)} rendered scenes right, there and back")
    result = {"judge": judge, "skills": {}}
    drawn, examples, seconds = None, [], {}
    if generate is not None:
        drawn, examples, seconds = _draw_and_judge(
            prompts, generate, score, candidates, max_pictures, report
        )
    for kind in skills:
        of_half = {
            half: [i for i, p in enumerate(prompts) if (p.scene.kind, p.half) == (kind, half)]
            for half in _HALVES
        }
        result["skills"][kind] = _skill(of_half, rebuilt, drawn)
    result["mean"] = _mean(list(result["skills"].values()))
    result["seconds_per_picture"] = seconds
    return result, examples


def checked_judge(image_px: int, num_oracle: int = 400, report: Report = lambda line: None) -> dict:
    """The judge's own accuracy on rendered scenes, as every report with verdicts holds it.

    Raises:
      UsageError: if the judge is not exact at this size.
    """
    oracle_accuracy = judge.oracle_accuracy(num_oracle, image_px)
    report(f"judge: right on {oracle_accuracy:.2%} of {num_oracle} rendered scenes")
    if oracle_accuracy < MIN_ORACLE:
        raise UsageError(
            f"the judge confirms only {oracle_accuracy:.2%} of the renderer's own pictures at "
            f"{image_px} px, {MIN_ORACLE:.1%} is needed; evaluate pictures of 32 or 64 px."
        )
    return {"oracle_accuracy": oracle_accuracy, "n": num_oracle, "image_px": image_px}


def recon_suite(
    batches: Iterable[np.ndarray],
    encode: Pictures,
    decode: Pictures,
    num_codes: int,
    report: Report = lambda line: None,
) -> tuple[dict, np.ndarray]:
    """PSNR, SSIM and codebook usage of a codec.

    Args:
      batches: uint8 [B, h, w, 3] each.
      encode: pictures to codes, int [B, ...].
      decode: codes to pictures, uint8 [B, h, w, 3].
      num_codes: V.
      report: called with lines of progress.

    Returns:
      `{"n", "psnr", "ssim", "codebook": {"codes", "used", "perplexity"}}`, and up to 8 pairs
      uint8 [2n, h, w, 3] for a grid: first originals, then reconstructions.
    """
    counts = np.zeros(num_codes, np.int64)
    psnr, ssim, shown = [], [], None
    timer = progress.Clock("recon", None, report)
    for images in batches:
        codes = np.asarray(encode(images))
        others = np.asarray(decode(codes))
        counts += np.bincount(codes.ravel(), minlength=num_codes)
        psnr.append(codec.psnr(images, others))
        ssim.append(codec.ssim(images, others))
        if shown is None:
            shown = np.concatenate([images[:8], others[:8]])
        timer.add(len(images))
    if shown is None:
        raise UsageError("there are no pictures to reconstruct; give a split that holds some.")
    result = {
        "n": sum(map(len, psnr)),
        "psnr": float(np.concatenate(psnr).mean()),
        "ssim": float(np.concatenate(ssim).mean()),
        "codebook": codec.codebook_usage(counts),
    }
    return result, shown


def retrieval_suite(
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    embed_images: Pictures,
    embed_texts: Callable[[np.ndarray], np.ndarray],
    ks: Sequence[int] = (1, 5),
    report: Report = lambda line: None,
) -> dict:
    """Recall at k from pictures to captions and back, with the level of chance.

    Args:
      batches: (uint8 [B, h, w, 3], token ids int32 [B, T]) each; equal rows of ids are one
        caption.
      embed_images: to unit vectors [B, E].
      embed_texts: token ids to unit vectors [B, E].
      ks: how many nearest to look at.
      report: called with lines of progress.

    Returns:
      `{"n", "captions", "image_to_text", "text_to_image", "chance"}`; captions are looked for
      among the distinct ones.
    """
    pictures, texts = [], []
    timer = progress.Clock("embed", None, report)
    for images, tokens in batches:
        pictures.append(np.asarray(embed_images(images), np.float32))
        texts.append(np.asarray(tokens))
        timer.add(len(images))
    if not pictures:
        raise UsageError("there are no pictures to look for; give a split that holds some.")
    tokens, pictures = np.concatenate(texts), np.concatenate(pictures)
    groups = retrieval.group(tokens)
    captions, first = np.unique(groups, return_index=True)
    size = max(1, len(tokens) // max(1, len(texts)))
    embedded = np.concatenate(
        [
            np.asarray(embed_texts(tokens[first[i : i + size]]), np.float32)
            for i in range(0, len(first), size)
        ]
    )
    return {
        "n": len(pictures),
        "captions": len(captions),
        "image_to_text": retrieval.recall(pictures, embedded, groups, captions, ks),
        "text_to_image": retrieval.recall(embedded, pictures, captions, groups, ks),
        "chance": {
            "image_to_text": retrieval.chance(groups, captions, ks),
            "text_to_image": retrieval.chance(captions, groups, ks),
        },
    }


def best_of(right: np.ndarray, scores: np.ndarray, k: int) -> float:
    """Chance that the best-scored of k random candidates is right; see the module's text.

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
    """Chance that at least one of k random candidates is right; bool [N], k in [1, N]."""
    num, wrong = len(right), int((~right).sum())
    return 1 - math.comb(wrong, k) / math.comb(num, k)


def powers(candidates: int) -> list[int]:
    """1, 2, 4, … up to and including `candidates`."""
    values = [2**i for i in range(candidates.bit_length()) if 2**i <= candidates]
    return values if values[-1] == candidates else [*values, candidates]


def _judge_reconstructions(prompts, image_px, reconstruct, max_pictures) -> np.ndarray:
    """Bool [P]: is the rendered scene still right after the codec?"""
    right = []
    for start in range(0, len(prompts), max_pictures):
        part = [prompt.scene for prompt in prompts[start : start + max_pictures]]
        images = np.stack([scenes.render(scene, image_px) for scene in part])
        for scene, image in zip(part, np.asarray(reconstruct(images)), strict=True):
            right.append(judge.judge(scene, image)["all"])
    return np.array(right)


@dataclasses.dataclass
class _Drawn:
    """Verdicts of all candidates: condition -> bool [P, N]; scores [P, N] or None."""

    verdicts: list[list[dict[str, bool]]]
    right: np.ndarray
    scores: np.ndarray | None


def _draw_and_judge(prompts, generate, score, candidates, max_pictures, report):
    size = min(len(prompts), max(1, max_pictures // candidates))
    timer = progress.Clock("draw and judge", len(prompts) * candidates, report)
    verdicts, scores, examples, times = [], [], [], []
    shown: dict[tuple, int] = {}
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        captions = [prompt.scene.caption for prompt in part]
        # One shape for all chunks, one compilation: the last one is filled up.
        filled = captions + captions[:1] * (size - len(part))
        begun = time.monotonic()
        images = np.asarray(generate(filled, candidates, start))[: len(part)]
        drawn = time.monotonic()
        part_scores = None
        if score is not None:
            flat = images.reshape(-1, *images.shape[2:])
            part_scores = np.asarray(score(flat, np.repeat(captions, candidates).tolist()))
            part_scores = part_scores.reshape(len(part), candidates)
            scores.append(part_scores)
        times.append((drawn - begun, time.monotonic() - drawn, len(part)))
        for i, prompt in enumerate(part):
            verdicts.append([judge.judge(prompt.scene, image) for image in images[i]])
            group = (prompt.scene.kind, prompt.half)
            shown[group] = shown.get(group, 0) + 1
            if shown[group] <= _SHOWN_PROMPTS:
                row = None if part_scores is None else part_scores[i]
                examples.append(_example(prompt, images[i], row, verdicts[-1]))
        timer.add(len(part) * candidates)
    right = np.array([[verdict["all"] for verdict in row] for row in verdicts])
    drawn = _Drawn(verdicts, right, np.concatenate(scores) if scores else None)
    return drawn, examples, _seconds_per_picture(times, size, candidates)


def _seconds_per_picture(times, size: int, candidates: int) -> dict[str, float]:
    """N -> seconds to draw and rank N candidates for one picture that is kept.

    The median chunk's, without the first, which compiles; N times one candidate's share of a
    chunk. One candidate needs no ranking.
    """
    times = times[1:] or times
    # A chunk that was filled up took as long as a full one to draw.
    draw = float(np.median([seconds for seconds, _, _ in times])) / (size * candidates)
    rank = float(np.median([seconds / n for _, seconds, n in times])) / candidates
    return {str(k): k * (draw + (rank if k > 1 else 0)) for k in powers(candidates)}


def _example(prompt: Prompt, images, scores, verdicts) -> Example:
    order = range(len(images)) if scores is None else np.argsort(-scores, kind="stable")
    order = list(order)[:_SHOWN_PICTURES]
    labels = tuple(
        ("right" if verdicts[i]["all"] else "wrong")
        + ("" if scores is None else f" {scores[i]:.3f}")
        for i in order
    )
    return Example(prompt, images[order], labels)


def _skill(of_half: dict[str, list[int]], rebuilt: np.ndarray, drawn: _Drawn | None) -> dict:
    seen, held_out = of_half["seen"], of_half["held_out"]
    result = {"n": len(seen)}
    if drawn is not None:
        num = drawn.right.shape[1]
        result["seen"] = float(drawn.right[seen].mean())
        result["held_out"] = float(drawn.right[held_out].mean())
        for prefix, indices in (("", seen), ("held_out_", held_out)):
            ranked = powers(num) if drawn.scores is not None else [1]
            scores = drawn.scores if drawn.scores is not None else np.zeros(drawn.right.shape)
            result[f"{prefix}best_of"] = {
                str(k): float(np.mean([best_of(drawn.right[i], scores[i], k) for i in indices]))
                for k in ranked
            }
            result[f"{prefix}oracle"] = {
                str(k): float(np.mean([any_of(drawn.right[i], k) for i in indices]))
                for k in powers(num)
            }
        first = drawn.verdicts[seen[0]][0]
        result["conditions"] = {
            name: float(np.mean([v[name] for i in seen for v in drawn.verdicts[i]]))
            for name in first
            if name != "all"
        }
    result["reconstruction"] = float(rebuilt[seen].mean())
    result["held_out_reconstruction"] = float(rebuilt[held_out].mean())
    return result


def _mean(skills: list[dict]) -> dict:
    """The mean over skills of every figure that all of them have."""
    result = {}
    for name, value in skills[0].items():
        if isinstance(value, dict) and name != "conditions":
            result[name] = {k: float(np.mean([s[name][k] for s in skills])) for k in value}
        elif isinstance(value, float):
            result[name] = float(np.mean([skill[name] for skill in skills]))
    return result
