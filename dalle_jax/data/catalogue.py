"""The features of the stock TFDS sets that hold pictures and captions: one literal table.

Sets that `prepare` writes hold `image` and `captions`; every set of the TFDS catalogue has feature
names of its own. `STOCK[name]` lists them, so that a config needs only
`data.source=coco_captions`. Keys are paths: `a/b` enters a dictionary, `[]` stands for every
element of a list.

Source: feature descriptions of tfds 4.9.10's builders (docs/data.md has the same table).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stock:
    """Paths of one set; either `caption_key` or `label_template` is empty."""

    image_key: str = "image"
    caption_key: str = ""
    label_template: str = ""  # fields are feature names: "a photo of a {label}"
    note: str = ""


def _labelled(template: str = "a photo of a {label}", note: str = "") -> Stock:
    return Stock(label_template=template, note=note)


STOCK: dict[str, Stock] = {
    "coco_captions": Stock(
        caption_key="captions/[]/text", note="5 captions a picture; TF to build"
    ),
    "laion400m": Stock(caption_key="caption", note="config images; manual download"),
    "wit_kaggle": Stock(
        caption_key="caption_title_and_reference_description",
        note="manual download; test captions are empty, missing pictures are 1x1 PNG",
    ),
    "ai2dcaption": Stock(caption_key="caption", note="diagrams"),
    "ref_coco": Stock(caption_key="objects/[]/refexp/[]/raw", note="phrases name regions"),
    "gref": Stock(caption_key="objects/[]/refexp/[]/raw", note="phrases name regions"),
    "covr": Stock(image_key="images/[]", caption_key="utterance", note="first picture is used"),
    "clevr": Stock(caption_key="question_answer/[]/question", note="questions, not captions"),
    "cifar10": _labelled(),
    "cifar100": _labelled(),
    "stl10": _labelled(),
    "imagenet2012": _labelled(note="manual download"),
    "imagenette": _labelled(note="labels are WordNet ids"),
    "food101": _labelled("a photo of {label}, a type of food"),
    "oxford_flowers102": _labelled("a photo of a {label}, a type of flower"),
    "oxford_iiit_pet": _labelled("a photo of a {label}, a type of pet"),
    "stanford_dogs": _labelled("a photo of a {label}, a type of dog"),
    "caltech_birds2011": _labelled("a photo of a {label}, a type of bird"),
    "dtd": _labelled("a photo of a {label} texture"),
    "tf_flowers": _labelled("a photo of {label}"),
    "quickdraw_bitmap": _labelled("a drawing of a {label}"),
    "mnist": _labelled('a photo of the number "{label}"'),
    "fashion_mnist": _labelled("a photo of a {label}"),
    "dsprites": _labelled("a {label_shape}", note="other factors: label_orientation, label_scale"),
    "shapes3d": _labelled(
        "object hue {label_object_hue}, shape {label_shape}, floor hue {label_floor_hue}, "
        "wall hue {label_wall_hue}"
    ),
}
