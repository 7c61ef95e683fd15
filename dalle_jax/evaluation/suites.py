"""Every suite of `evaluate`: the stages that it opens, and what it measures with them.

    result = suites.measure("unclip", "shapes", pretrained.folders("shapes"), Settings())

Several processes share the prompts of suite shapes; each of the other suites runs in one process.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from dalle_jax import chunks, images
from dalle_jax import config as cfg
from dalle_jax.data import pipeline
from dalle_jax.data.tokenizers import Tokenizer
from dalle_jax.evaluation import (
    codec,
    distribution,
    edits,
    generators,
    judge,
    progress,
    results,
    retrieval,
    shapes,
)
from dalle_jax.evaluation.generators import DalleGenerator, UnclipGenerator
from dalle_jax.evaluation.results import Result
from dalle_jax.evaluation.settings import Settings
from dalle_jax.stages.clip import ClipStage
from dalle_jax.stages.codec import Codec
from dalle_jax.stages.dalle import DalleStage
from dalle_jax.types import UsageError

BATCH = 64  # real pictures at a time
_FLAGS = {"dalle": "--workdir=DIR", "dvae": "--dvae=DIR", "clip": "--clip=DIR"}


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite of one pipeline.

    Attributes:
      open: (folders, settings) -> what `measure` takes.
      measure: (what `open` returns, settings, report) -> Result.
      stages: names of those that it uses, where there are folders for them.
      needs: names of which one must have a folder; () = `open` refuses what is missing.
    """

    open: Callable[[Mapping[str, str], Settings], Any]
    measure: Callable[[Any, Settings, progress.Report], Result]
    stages: tuple[str, ...]
    needs: tuple[str, ...] = ()


def measure(
    pipeline: str,
    suite: str,
    folders: Mapping[str, str],
    settings: Settings,
    report: progress.Report = progress.silent,
) -> Result:
    """Opens the stages of a suite and measures them.

    Args:
      pipeline: "dalle" or "unclip".
      suite: with the pipeline, a key of SUITES.
      folders: stage -> workdir or exported folder, e.g. of a pretrained set; those that the suite
        does not use are ignored.
      settings: what to measure.
      report: called with lines of progress.

    Returns:
      `{"suite": …, …, "networks": folders used}` with floats of five digits, and pictures.

    Raises:
      UsageError: for an unknown suite, or folders and settings that do not fit, before anything
        compiles.
    """
    entry = find(pipeline, suite)
    if suite == "distribution":
        distribution.check_count(settings.examples.num)
    used = networks(pipeline, suite, folders, settings)
    figures, rows = entry.measure(entry.open(used, settings), settings, report)
    return Result(results.rounded({"suite": suite, **figures, "networks": used}), rows)


def find(pipeline: str, suite: str) -> Suite:
    """The entry of SUITES; UsageError, which lists the pipeline's suites, if there is none."""
    if (pipeline, suite) not in SUITES:
        known = ", ".join(name for other, name in SUITES if other == pipeline)
        raise UsageError(
            f"pipeline {pipeline!r} has no suite {suite!r}; use one of {known or 'no suite'}, or "
            "another --pipeline."
        )
    return SUITES[pipeline, suite]


def networks(
    pipeline: str, suite: str, folders: Mapping[str, str], settings: Settings
) -> dict[str, str]:
    """The folders that a suite uses: stage -> folder.

    Raises:
      UsageError: if one is missing that the suite cannot do without.
    """
    entry = find(pipeline, suite)
    stages = set(entry.stages)
    if entry.needs and not any(name in folders for name in entry.needs):
        raise UsageError(
            f"--suite={suite} needs {' or '.join(_FLAGS[name] for name in entry.needs)}, "
            "or --pretrained=NAME."
        )
    if (pipeline, suite) == ("dalle", "shapes") and "dalle" not in folders:
        stages -= {"clip"}  # nothing to rank
    if pipeline == "unclip":
        if results.DALLE not in (settings.unclip.priors or ()):
            stages -= {"dalle", "dvae"}
        elif "dalle" not in folders:
            raise UsageError(
                "there is no DALL-E 1: give --workdir=DIR, or a --pretrained set that holds one."
            )
        if not settings.unclip.upsamples:
            stages -= {"upsampler_1", "upsampler_2"}
    elif suite == "distribution" and settings.features != "pixels" and "clip" not in folders:
        raise UsageError(
            "--suite=distribution compares pictures by CLIP's features; give --clip=DIR, or "
            "--features=pixels."
        )
    return {name: folder for name, folder in folders.items() if name in stages}


def shapes_by_dalle(
    opened: DalleGenerator | Codec, settings: Settings, report: progress.Report
) -> Result:
    """Suite shapes for DALL-E 1, or its ceiling for a codec alone."""
    if not isinstance(opened, Codec):
        return _shapes(opened, opened.clip, settings, report)
    reconstruct = generators.round_trip(opened)
    options = dict(reconstruct=reconstruct, settings=settings, report=report)
    return shapes.suite(image_px=opened.image_px, **options)


def shapes_by_unclip(
    opened: tuple[UnclipGenerator, DalleGenerator | None],
    settings: Settings,
    report: progress.Report,
) -> Result:
    """Suite shapes for each prior and guidance of DALL-E 2, and for a DALL-E 1 beside them."""
    generator, other = opened
    runs = _sweep(generator)
    if other is not None:
        runs.append(({"prior": results.DALLE, **dataclasses.asdict(other.settings)}, other))
    measured = [
        (names, functools.partial(_shapes, run, generator.clip, settings, report))
        for names, run in runs
    ]
    return results.measure_runs(measured, report)


def recon(opened: Codec, settings: Settings, report: progress.Report) -> Result:
    """PSNR, SSIM and codebook usage of a codec."""
    encode = chunks.mapped(opened.encode, generators.CHUNK)
    decode = chunks.mapped(opened.decode, generators.CHUNK)
    split, batches = _examples(opened.config, settings, {"image"})
    figures, rows = codec.suite(
        (batch["image"] for batch in batches),
        lambda pictures: encode(images.to_float(pictures)),
        lambda codes: images.to_uint8(decode(codes)),
        opened.num_codes,
        report,
    )
    return Result({**figures, "split": split}, rows)


def retrieve(opened: ClipStage, settings: Settings, report: progress.Report) -> Result:
    """Recall of a CLIP from pictures to captions and the reverse."""
    split, batches = _examples(opened.config, settings, {"image", "text"}, opened.tokenizer)
    figures, _ = retrieval.suite(
        ((batch["image"], batch["text"]) for batch in batches),
        lambda pictures: opened.embed_images(images.to_float(pictures)),
        opened.embed_texts,
        report=report,
    )
    return Result({**figures, "split": split})


def distribution_by_dalle(
    opened: DalleGenerator, settings: Settings, report: progress.Report
) -> Result:
    """Suite distribution for DALL-E 1."""
    own = opened.settings
    names = {"guidance": own.guidance, "temperature": own.temperature}
    return _distribution(opened, [(names, opened)], settings, report)


def distribution_by_unclip(
    opened: UnclipGenerator, settings: Settings, report: progress.Report
) -> Result:
    """Suite distribution for each prior and guidance of DALL-E 2."""
    return _distribution(opened, _sweep(opened), settings, report)


def variations(opened: UnclipGenerator, settings: Settings, report: progress.Report) -> Result:
    """Suite variations for each guidance and eta."""
    image_px = opened.network.image_px
    accuracy = judge.check_accuracy(image_px, report)
    # Without noise all variations are one; the chunks hold the same scenes.
    one = dataclasses.replace(
        settings, candidates=1, batch=max(1, settings.batch // settings.candidates)
    )
    runs = [
        (
            {"guidance": guidance, "eta": eta},
            functools.partial(
                edits.variations,
                opened.at(guidance, eta=eta).vary,
                image_px,
                settings if eta else one,
                report,
            ),
        )
        for guidance in opened.settings.guidances
        for eta in opened.settings.etas
    ]
    figures, rows = results.measure_runs(runs, report)
    return Result({"judge": accuracy, **figures}, rows)


def inpainting(opened: UnclipGenerator, settings: Settings, report: progress.Report) -> Result:
    """Suite inpainting for each prior and guidance, at the finished size."""
    image_px = opened.stages.image_px
    accuracy = judge.check_accuracy(image_px, report)
    runs = [
        (names, functools.partial(edits.inpainting, run.inpaint, image_px, settings, report))
        for names, run in _sweep(opened)
    ]
    figures, rows = results.measure_runs(runs, report)
    by = "decoder" if opened.stages.inpainter is None else "inpainter"
    return Result({"judge": accuracy, "by": by, **figures}, rows)


def _sweep(generator: UnclipGenerator) -> list[tuple[dict, Any]]:
    """(its settings, its generator) for each run over guidances and priors."""
    return [
        ({"prior": prior, "guidance": guidance}, generator.at(guidance, prior))
        for guidance in generator.settings.guidances
        for prior in generator.priors
    ]


def _shapes(generator, clip: ClipStage | None, settings, report) -> Result:
    generate = generators.shared(generator.generate)
    return shapes.suite(
        image_px=generator.network.image_px,
        reconstruct=generator.reconstruct,
        generate=lambda captions, *rest: generate(generator.reader.tokenize(captions), *rest),
        score=None if clip is None else generators.score_by(clip),
        settings=settings,
        report=report,
    )


def _distribution(generator, runs, settings, report) -> Result:
    """Runs (settings, generator) against the same real pictures."""
    embed = distribution.FEATURES[settings.features](generator.clip)
    own = generator.reader.tokenizer
    split, batches = _examples(generator.network.config, settings, {"image", "text"}, own)
    pairs = ((batch["image"], batch["text"]) for batch in batches)
    real = distribution.Real(pairs, embed, own.decode, report)
    measured = [
        (
            names,
            functools.partial(distribution.suite, real, run.generate, embed, settings, report),
        )
        for names, run in runs
    ]
    figures, rows = results.measure_runs(measured, report)
    return Result({"split": split, "features": settings.features, **figures}, [real.row, *rows])


def _examples(
    config: cfg.ConfigDict,
    settings: Settings,
    fields: set[str],
    tokenizer: Tokenizer | None = None,
) -> tuple[str, Iterator[Mapping[str, np.ndarray]]]:
    """The name of the split, and batches of its first examples in order.

    Args:
      config: of a trained network; `settings.examples` takes precedence over its data section.
      settings: examples and seed.
      fields: of the batches, see `data.pipeline.make`.
      tokenizer: see there.
    """
    chosen = settings.examples
    data = cfg.ConfigDict(config.data.to_dict())
    data.source, data.data_dir = chosen.source or data.source, chosen.data_dir or data.data_dir
    split = chosen.split or data.eval_split
    size = min(BATCH, chosen.num)
    options = dict(wanted=fields, tokenizer=tokenizer, training=False, batch=size)
    batch_of = pipeline.make(data, settings.seed, split=split, **options)
    num = min(chosen.num, batch_of.num_examples)

    def batches():
        for step in range(-(-num // size)):
            yield {name: rows[: num - step * size] for name, rows in batch_of(step).items()}

    return split, batches()


def _open_dalle(folders: Mapping[str, str], settings: Settings) -> DalleGenerator | Codec:
    """DALL-E 1 with its CLIP, or a codec alone."""
    if "dalle" not in folders:
        return Codec.load(folders["dvae"])
    stage = DalleStage.load(folders["dalle"], codec=folders.get("dvae", ""))
    clip = ClipStage.load(folders["clip"]) if "clip" in folders else None
    return DalleGenerator(stage, clip, settings.dalle, settings.seed)


def _open_codec(folders: Mapping[str, str], settings: Settings) -> Codec:
    if "dvae" in folders:
        return Codec.load(folders["dvae"])
    return DalleStage.load(folders["dalle"]).codec


def _open_clip(folders: Mapping[str, str], settings: Settings) -> ClipStage:
    return ClipStage.load(folders["clip"])


def _open_unclip(folders: Mapping[str, str], settings: Settings) -> UnclipGenerator:
    return UnclipGenerator.load(folders, settings.unclip, settings.seed)


def _open_both(
    folders: Mapping[str, str], settings: Settings
) -> tuple[UnclipGenerator, DalleGenerator | None]:
    """DALL-E 2, and a DALL-E 1 whose pictures have the same size."""
    two = {name: folder for name, folder in folders.items() if name not in ("dalle", "dvae")}
    one = {name: folder for name, folder in folders.items() if name in ("dalle", "dvae")}
    generator = _open_unclip(two, settings)
    other = _open_dalle(one, settings) if "dalle" in one else None
    if other is not None and other.network.image_px != generator.network.image_px:
        raise UsageError(
            f"the DALL-E 1 {folders['dalle']!r} draws {other.network.image_px} px, but the decoder "
            f"{folders['decoder']!r} {generator.network.image_px} px: the judge sees more on "
            "larger pictures; compare networks of one size, or measure each by itself."
        )
    return generator, other


_PRIORS = ("clip", "decoder", "prior", "prior_ar")
_DALLE = ("dalle", "dvae", "clip")
SUITES = {
    ("dalle", "shapes"): Suite(_open_dalle, shapes_by_dalle, _DALLE, ("dalle", "dvae")),
    ("dalle", "recon"): Suite(_open_codec, recon, ("dvae", "dalle"), ("dvae", "dalle")),
    ("dalle", "retrieval"): Suite(_open_clip, retrieve, ("clip",), ("clip",)),
    ("dalle", "distribution"): Suite(_open_dalle, distribution_by_dalle, _DALLE, ("dalle",)),
    ("unclip", "shapes"): Suite(_open_both, shapes_by_unclip, (*_PRIORS, "dalle", "dvae")),
    ("unclip", "distribution"): Suite(_open_unclip, distribution_by_unclip, _PRIORS),
    ("unclip", "variations"): Suite(_open_unclip, variations, ("clip", "decoder")),
    ("unclip", "inpainting"): Suite(
        _open_unclip, inpainting, (*_PRIORS, "inpaint", "upsampler_1", "upsampler_2")
    ),
}
