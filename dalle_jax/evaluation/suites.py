"""Every suite of `evaluate`: the stages that it opens, and what it measures with them.

    result = suites.measure("unclip", "shapes", pretrained.folders("shapes"), Settings())

Several processes share the prompts of suite shapes; each of the other suites runs in one process.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

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
from dalle_jax.stages.unclip import Unclip
from dalle_jax.types import UsageError

BATCH = 64  # real pictures at a time
_FLAGS = {"dalle": "--workdir=DIR", "dvae": "--dvae=DIR", "clip": "--clip=DIR"}


@dataclasses.dataclass(frozen=True)
class Stages:
    """The stages in some folders, each opened when a suite asks for it.

    Attributes:
      folders: stage -> workdir or exported folder.
      settings: how the generators sample.
    """

    folders: Mapping[str, str]
    settings: Settings

    @functools.cached_property
    def codec(self) -> Codec:
        """The codec, or that of the DALL-E."""
        if "dvae" in self.folders:
            return Codec.load(self.folders["dvae"])
        return self.dalle.stage.codec

    @functools.cached_property
    def clip(self) -> ClipStage | None:
        """The CLIP."""
        return ClipStage.load(self.folders["clip"]) if "clip" in self.folders else None

    @functools.cached_property
    def dalle(self) -> DalleGenerator | None:
        """DALL-E 1."""
        if "dalle" not in self.folders:
            return None
        stage = DalleStage.load(self.folders["dalle"], codec=self.folders.get("dvae", ""))
        return DalleGenerator(stage, self.settings.dalle, self.settings.seed)

    @functools.cached_property
    def unclip(self) -> UnclipGenerator:
        """DALL-E 2, checked."""
        own = {name: x for name, x in self.folders.items() if name not in ("dalle", "dvae")}
        generator = UnclipGenerator(Unclip.load(own), self.settings.unclip, self.settings.seed)
        generator.check()
        return generator


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite of one pipeline.

    Attributes:
      measure: (stages, settings, report) -> Result.
      stages: names of those that it uses, where there are folders for them.
      needs: names of which one must have a folder; () = loading refuses what is missing.
    """

    measure: Callable[[Stages, Settings, progress.Report], Result]
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
        distribution.check_count(settings.examples.num, "examples")
    used = networks(pipeline, suite, folders, settings)
    figures, rows = entry.measure(Stages(used, settings), settings, report)
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


def shapes_by_dalle(stages: Stages, settings: Settings, report: progress.Report) -> Result:
    """Suite shapes for DALL-E 1, or its ceiling for a codec alone."""
    if stages.dalle is not None:
        return _shapes(stages.dalle, stages.clip, settings, report)
    reconstruct, image_px = generators.round_trip(stages.codec), stages.codec.image_px
    return shapes.suite(
        image_px=image_px, reconstruct=reconstruct, settings=settings, report=report
    )


def shapes_by_unclip(stages: Stages, settings: Settings, report: progress.Report) -> Result:
    """Suite shapes for each prior and guidance of DALL-E 2, and for a DALL-E 1 beside them.

    Raises:
      UsageError: if the two generate pictures of different sizes.
    """
    clip, other, px = stages.unclip.clip, stages.dalle, stages.unclip.network.image_px
    runs = stages.unclip.runs()
    if other is not None:
        if other.network.image_px != px:
            raise UsageError(
                f"the DALL-E 1 {stages.folders['dalle']!r} samples {other.network.image_px} px, "
                f"but the decoder {stages.folders['decoder']!r} {px} px: the judge sees more on "
                "larger pictures; compare networks of one size, or measure each by itself."
            )
        runs.append(({"prior": results.DALLE, **dataclasses.asdict(other.settings)}, other))
    return results.measure_runs(runs, lambda run: _shapes(run, clip, settings, report), report)


def recon(stages: Stages, settings: Settings, report: progress.Report) -> Result:
    """PSNR, SSIM and codebook usage of a codec."""
    own = stages.codec
    encode = chunks.mapped(own.encode, generators.CHUNK)
    decode = chunks.mapped(own.decode, generators.CHUNK)
    split, batches = _examples(own.config, settings, "image")
    figures, rows = codec.suite(
        (pictures for (pictures,) in batches),
        lambda pictures: encode(images.to_float(pictures)),
        lambda codes: images.to_uint8(decode(codes)),
        own.num_codes,
        report,
    )
    return Result({**figures, "split": split}, rows)


def retrieve(stages: Stages, settings: Settings, report: progress.Report) -> Result:
    """Recall of a CLIP from pictures to captions and the reverse."""
    clip = stages.clip
    split, batches = _examples(clip.config, settings, "image", "text", tokenizer=clip.tokenizer)
    embed = distribution.clip_features(clip)
    figures, _ = retrieval.suite(batches, embed, clip.embed_texts, report=report)
    return Result({**figures, "split": split})


def distribution_by_dalle(stages: Stages, settings: Settings, report: progress.Report) -> Result:
    """Suite distribution for DALL-E 1."""
    own = stages.dalle.settings
    runs = [({"guidance": own.guidance, "temperature": own.temperature}, stages.dalle)]
    return _distribution(stages.dalle, stages.clip, runs, settings, report)


def distribution_by_unclip(stages: Stages, settings: Settings, report: progress.Report) -> Result:
    """Suite distribution for each prior and guidance of DALL-E 2."""
    own = stages.unclip
    return _distribution(own, own.clip, own.runs(), settings, report)


def variations(stages: Stages, settings: Settings, report: progress.Report) -> Result:
    """Suite variations for each guidance and eta."""
    own = stages.unclip
    image_px = own.network.image_px
    accuracy = judge.check_accuracy(image_px, report)
    # Without noise all variations are one; the chunks hold the same scenes.
    one = dataclasses.replace(
        settings, candidates=1, batch=max(1, settings.batch // settings.candidates)
    )
    runs = [
        ({"guidance": guidance, "eta": eta}, own.at(guidance, eta=eta))
        for guidance in own.settings.guidances
        for eta in own.settings.etas
    ]

    def measure(run):
        return edits.variations(run.vary, image_px, settings if run.sampling.eta else one, report)

    figures, rows = results.measure_runs(runs, measure, report)
    return Result({"judge": accuracy, **figures}, rows)


def inpainting(stages: Stages, settings: Settings, report: progress.Report) -> Result:
    """Suite inpainting for each prior and guidance, at the finished size."""
    own = stages.unclip
    image_px = own.stages.image_px
    accuracy = judge.check_accuracy(image_px, report)

    def measure(run):
        return edits.inpainting(run.inpaint, image_px, settings, report)

    figures, rows = results.measure_runs(own.runs(), measure, report)
    by = "decoder" if own.stages.inpainter is None else "inpainter"
    return Result({"judge": accuracy, "by": by, **figures}, rows)


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


def _distribution(generator, clip: ClipStage | None, runs, settings, report) -> Result:
    """Runs (settings, generator) against the same real pictures."""
    embed, own = distribution.FEATURES[settings.features](clip), generator.reader.tokenizer
    config = generator.network.config
    split, batches = _examples(config, settings, "image", "text", tokenizer=own)
    real = distribution.Real(batches, embed, own.decode, report)

    def measure(run):
        return distribution.suite(real, run.generate, embed, settings, report)

    figures, rows = results.measure_runs(runs, measure, report)
    return Result({"split": split, "features": settings.features, **figures}, [real.row, *rows])


def _examples(
    config: cfg.ConfigDict, settings: Settings, *fields: str, tokenizer: Tokenizer | None = None
) -> tuple[str, Iterator[tuple[np.ndarray, ...]]]:
    """The name of the split, and its first examples in order, in batches.

    Args:
      config: of a trained network; `settings.examples` takes precedence over its data section.
      settings: examples and seed.
      *fields: what a batch holds, see `data.pipeline.make`.
      tokenizer: see there.
    """
    chosen = settings.examples
    data = cfg.ConfigDict(config.data.to_dict())
    data.source, data.data_dir = chosen.source or data.source, chosen.data_dir or data.data_dir
    split = chosen.split or data.eval_split
    size = min(BATCH, chosen.num)
    options = dict(fields=set(fields), tokenizer=tokenizer, training=False, batch=size)
    batch_of = pipeline.make(data, settings.seed, split=split, **options)
    num = min(chosen.num, batch_of.num_examples)

    def batches():
        for step in range(-(-num // size)):
            batch = batch_of(step)
            yield tuple(batch[name][: num - step * size] for name in fields)

    return split, batches()


_PRIORS = ("clip", "decoder", "prior", "prior_ar")
_DALLE = ("dalle", "dvae", "clip")
_INPAINT = ("inpaint", "upsampler_1", "upsampler_2")
SUITES = {
    ("dalle", "shapes"): Suite(shapes_by_dalle, _DALLE, ("dalle", "dvae")),
    ("dalle", "recon"): Suite(recon, ("dvae", "dalle"), ("dvae", "dalle")),
    ("dalle", "retrieval"): Suite(retrieve, ("clip",), ("clip",)),
    ("dalle", "distribution"): Suite(distribution_by_dalle, _DALLE, ("dalle",)),
    ("unclip", "shapes"): Suite(shapes_by_unclip, (*_PRIORS, "dalle", "dvae")),
    ("unclip", "distribution"): Suite(distribution_by_unclip, _PRIORS),
    ("unclip", "variations"): Suite(variations, ("clip", "decoder")),
    ("unclip", "inpainting"): Suite(inpainting, (*_PRIORS, *_INPAINT)),
}
