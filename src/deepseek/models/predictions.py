"""From images and texts to answers that people read: classes, boxes, vectors. `deepseek predict` is made of these.

    model = load_model("yolov7", weights="yolov7.safetensors")
    (found,) = model.detect("street.jpg")                     Objects: boxes_N4, scores_N, labels
    load_model("all-MiniLM-L6-v2").embed(["one text", "another"])      (2, 384), of length one
    load_model("resnet50", weights=...).classify("cat.jpg")   [(label, probability), ...] for each image

What comes before a model (tokens, sizes, colors) and after it (pooling, suppression, names) is taken from the files
beside its weights where they say it: `preprocessor_config.json` for images, `1_Pooling/config.json`, `modules.json` and
`sentence_bert_config.json` for sentence encoders, `id2label` for classes. What cannot be followed is refused.

A model that a backend runs was compiled for one shape. Inputs are put together to that shape, the last batch filled up
with copies whose answers are dropped.

Shapes: N inputs, C channels, H x W image, T tokens, D hidden, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.core.errors import ConfigError, CorruptArtifactError
from deepseek.data.images import read_image
from deepseek.data.letterbox import letterbox, restore
from deepseek.data.text_collate import INPUT_NAMES
from deepseek.data.tokenizing import TOKENIZER_FILE, read_tokenizer_file
from deepseek.models.answering import answers_questions
from deepseek.models.decoder.model import Decoder
from deepseek.models.transformers_models.model import TransformersModel
from deepseek.models.transformers_models.pooling import POOLING_CONFIG_NAME, POOLINGS
from deepseek.models.yolov7.labels import COCO_LABELS
from deepseek.models.yolov7.model import YOLOv7, YOLOv7Config
from deepseek.models.yolov7.suppression import select

Image = str | Path | Tensor
BATCH_SIZE = 16
"""Inputs that go through a model together where no backend fixed another number."""
NUM_TOP = 5
TEXT_PAIR = "text_pair"
"""The entry of a `config.json` that says whether a classifier was trained on pairs of texts."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP_SHARE = 0.875  # of the shorter side that a classifier looks at, as torchvision and timm train and measure it
_MODE = "pooling_mode_"
_LARGEST_LENGTH = 10**6  # transformers writes 1e30 where a tokenizer has no limit


@dataclass(frozen=True)
class Predictor:
    """A model as these functions see it."""

    module: nn.Module | None
    """The plain module, which says what kind of model it is."""
    run: Callable[..., Tensor]
    """The function that a call runs."""
    fixed: tuple[int, ...] | None
    """The shape of the input that a backend was compiled for; none where any will do."""
    folder: Path | None
    """Where its tokenizer and settings are."""

    @property
    def name(self) -> str:
        """Return its name for an error message."""
        return "a file that only a runtime can run" if self.module is None else f"a {type(self.module).__name__}"


@dataclass(frozen=True)
class Objects:
    """Objects found in one image, the most confident first."""

    boxes_N4: Tensor
    """Left, top, right, bottom in pixels of the image."""
    scores_N: Tensor
    """How sure the model is, from 0 to 1."""
    classes_N: Tensor
    """Number of the class."""
    labels: tuple[str, ...]
    """Name of the class."""


# ---- boxes


def detect(
    predictor: Predictor, images: Image | Sequence[Image], *, min_score: float, max_overlap: float
) -> list[Objects]:
    """Find the objects in each of `images`: paths, or tensors (3, H, W) with values in [0, 1]."""
    model = predictor.module
    if not isinstance(model, YOLOv7):
        raise ConfigError(f"this is {predictor.name}, which finds no objects; load a detector, for example yolov7")
    size = model.config.image_size
    height, width = predictor.fixed[-2:] if predictor.fixed else (size, size)
    fitted = [letterbox(image, (height, width)) for image in read_images(images)]
    if not fitted:
        return []
    predictions = run_in_batches(predictor, torch.stack([image for image, _ in fitted]))
    detections = select(predictions.float(), min_score=min_score, max_overlap=max_overlap)
    found = []
    for index, (_, how) in enumerate(fitted):
        boxes_N4, scores_N, classes_N = detections.of(index)
        labels = tuple(_name_object(int(number), model.config) for number in classes_N)
        found.append(Objects(restore(boxes_N4, how), scores_N, classes_N, labels))
    return found


def _name_object(number: int, config: YOLOv7Config) -> str:
    labels = config.labels or (COCO_LABELS if config.num_classes == len(COCO_LABELS) else ())
    return labels[number] if labels else f"class {number}"


# ---- vectors


def embed(predictor: Predictor, texts: str | Sequence[str], *, normalize: bool) -> Tensor:
    """One vector for each text, (N, D), pooled as the files beside the model say, else by the mean of its tokens."""
    model = predictor.module
    if not isinstance(model, TransformersModel) or not model.is_text:
        way = "; deepseek generate continues texts" if isinstance(model, Decoder) else ""
        raise ConfigError(f"this is {predictor.name}, which gives no vector for a text{way}; load a text encoder")
    run = model.encode
    if predictor.fixed is not None:
        if model.has_head:
            raise ConfigError(
                f"this is a {type(model.model).__name__} run by a backend, which answers with its head; load it "
                "without a backend, where the encoder below the head is used"
            )
        run = predictor.run
    texts = [texts] if isinstance(texts, str) else list(texts)
    recipe = _read_recipe(predictor.folder)
    inputs = _tokenize(predictor, model, [recipe.prompt + text for text in texts], max_length=recipe.max_length)
    if not texts:
        return torch.zeros(0, 0)
    hidden_NTD, mask_NT = _run_text(replace(predictor, run=run), model, inputs), inputs["attention_mask"]
    vectors_ND = POOLINGS[recipe.pooling](hidden_NTD.float(), mask_NT)
    return F.normalize(vectors_ND, dim=-1) if normalize else vectors_ND


@dataclass(frozen=True)
class _Recipe:
    """Settings of a sentence encoder, from the files of `sentence-transformers`."""

    pooling: str = "mean"
    prompt: str = ""
    max_length: int | None = None


def _read_recipe(folder: Path | None) -> _Recipe:
    if folder is None:
        return _Recipe()
    modules = _read_beside(folder, "modules.json") or []
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules if isinstance(module, dict)]
    unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown:
        raise ConfigError(
            f"{folder / 'modules.json'} has a {unknown[0]}, which is not followed here; load another encoder"
        )
    pooling = _read_beside(folder, POOLING_CONFIG_NAME) or {}
    modes = {
        name.removeprefix("pooling_mode_").removesuffix("s").removesuffix("_token"): pooling[name] for name in pooling
    }
    chosen = [mode for mode, is_chosen in modes.items() if is_chosen is True and mode != "include_prompt"]
    chosen = [str(pooling["pooling_mode"])] if "pooling_mode" in pooling else chosen
    if len(chosen) > 1 or any(name not in POOLINGS for name in chosen):
        raise ConfigError(
            f"{folder / '1_Pooling/config.json'} pools by {' and '.join(chosen)} and one of {', '.join(POOLINGS)} is "
            "followed here; load another encoder"
        )
    prompts = _read_beside(folder, "config_sentence_transformers.json") or {}
    prompt = (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name"), "")
    length = (_read_beside(folder, "sentence_bert_config.json") or {}).get("max_seq_length")
    return _Recipe(chosen[0] if chosen else "mean", prompt, length)


def _tokenize(
    predictor: Predictor,
    model: TransformersModel,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    max_length: int | None = None,
) -> dict[str, Tensor]:
    """Tokenize texts, or pairs, to inputs (N, T), padded to the longest or to what a backend was compiled for."""
    if predictor.folder is None or not (predictor.folder / TOKENIZER_FILE).is_file():
        where = predictor.folder or "a model by name"
        raise ConfigError(f"{where} has no {TOKENIZER_FILE}, and texts need one; load a folder that holds it")
    tokenizer = read_tokenizer_file(predictor.folder / TOKENIZER_FILE)
    settings = _read_beside(predictor.folder, "tokenizer_config.json") or {}
    limits = [max_length, settings.get("model_max_length"), model.max_length]
    known = [int(limit) for limit in limits if limit and limit < _LARGEST_LENGTH]
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if known:
        tokenizer.enable_truncation(min(known))
    items = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
    encoded = tokenizer.encode_batch(items, add_special_tokens=True)
    longest = max((len(encoding.ids) for encoding in encoded), default=0)
    fixed = predictor.fixed[1] if predictor.fixed else 0
    length = fixed if longest <= fixed else longest
    tokens_NT = torch.full((len(encoded), length), model.pad_id, dtype=torch.int64)
    mask_NT, segments_NT = torch.zeros_like(tokens_NT), torch.zeros_like(tokens_NT)
    for row, encoding in enumerate(encoded):
        tokens_NT[row, : len(encoding.ids)] = torch.tensor(encoding.ids, dtype=torch.int64)
        mask_NT[row, : len(encoding.ids)] = 1
        if pairs is not None:  # single texts are all of segment 0, whatever a tokenizer says, as in training
            segments_NT[row, : len(encoding.ids)] = torch.tensor(encoding.type_ids, dtype=torch.int64)
    return dict(zip(INPUT_NAMES, (tokens_NT, mask_NT, segments_NT), strict=True))


def _run_text(predictor: Predictor, model: TransformersModel, inputs: Mapping[str, Tensor]) -> Tensor:
    return run_in_batches(predictor, *(inputs[name] for name in model.input_names if name in inputs))


# ---- classes


def classify(
    predictor: Predictor, inputs: Image | Sequence[Image], pairs: str | Sequence[str] | None = None
) -> list[list[tuple[str, float]]]:
    """Return the likeliest classes of each image, text or pair, at most `NUM_TOP`, with probabilities, best first."""
    model = predictor.module
    if model is None or isinstance(model, YOLOv7 | Decoder):
        raise ConfigError(f"this is {predictor.name}, which predicts no classes; load a classifier")
    if answers_questions(model):
        raise ConfigError(f"this is {predictor.name} that finds answers in texts; call answer")
    if is_regression(model):
        raise ConfigError(f"this is {predictor.name} that estimates a number and knows no classes; call estimate")
    scores = _score(predictor, model, inputs, pairs)
    labels = _read_labels(model, scores.shape[1])
    best = scores.float().softmax(dim=1).topk(min(NUM_TOP, scores.shape[1]), dim=1)
    return [
        [(labels[int(number)], float(share)) for number, share in zip(numbers, shares, strict=True)]
        for numbers, shares in zip(best.indices, best.values, strict=True)
    ]


def estimate(predictor: Predictor, texts: str | Sequence[str], pairs: str | Sequence[str] | None = None) -> list[float]:
    """Return the number that a regression estimates for each text or pair."""
    model = predictor.module
    if model is None or not is_regression(model):
        raise ConfigError(f"this is {predictor.name}, which estimates no number; load a model trained for regression")
    return [float(number) for number in _score(predictor, model, texts, pairs)[:, 0]]


def is_regression(module: nn.Module | None) -> bool:
    """Return whether a model answers a text with one number and not with classes."""
    is_text = isinstance(module, TransformersModel) and module.is_text
    return is_text and module.config.get("problem_type") == "regression"  # type: ignore[union-attr, operator]


def takes_pairs(module: nn.Module | None) -> bool | None:
    """Return whether a model was trained on pairs of texts; `None` where its config does not say."""
    is_text = isinstance(module, TransformersModel) and module.is_text
    return module.config.get(TEXT_PAIR) if is_text else False  # type: ignore[union-attr, operator]


def _list_pairs(predictor: Predictor, texts: Sequence[str], pairs: str | Sequence[str] | None) -> list[str] | None:
    """Return the second text of each pair; raises `ConfigError` where the model or the texts want another number."""
    wanted = takes_pairs(predictor.module)
    if pairs is None:
        if wanted:
            raise ConfigError(
                f"this is {predictor.name} that was trained on pairs of texts, and single ones were given; give the "
                "second text of each as well (pairs=, or --pair)"
            )
        return None
    if wanted is False:
        raise ConfigError(f"this is {predictor.name} that was not trained on pairs; leave the second texts out")
    seconds = [pairs] if isinstance(pairs, str) else [str(text) for text in pairs]
    if len(seconds) != len(texts):
        raise ConfigError(f"first texts are {len(texts)} and second texts {len(seconds)}; give as many of both")
    return seconds


def _score(
    predictor: Predictor, model: nn.Module, inputs: Image | Sequence[Image], pairs: str | Sequence[str] | None
) -> Tensor:
    """Return one score for each input and class, (N, K)."""
    if isinstance(model, TransformersModel) and model.is_text:
        texts = [inputs] if isinstance(inputs, str) else [str(text) for text in _as_list(inputs)]
        tokens = _tokenize(predictor, model, texts, _list_pairs(predictor, texts, pairs))
        scores = _run_text(predictor, model, tokens) if texts else torch.zeros(0, 1)
    elif pairs is not None:
        raise ConfigError(f"this is {predictor.name}, which takes images and no pairs of texts; leave pairs out")
    else:
        images = _as_list(inputs)
        scores = run_in_batches(predictor, prepare_images(predictor, images)) if images else torch.zeros(0, 1)
    if scores.dim() != 2:
        raise ConfigError(
            f"this is {predictor.name}, which answers {tuple(scores.shape)} instead of one score for each class; "
            "load a classifier"
        )
    return scores


def _read_labels(model: nn.Module, num_classes: int) -> list[str]:
    if isinstance(model, TransformersModel):
        names = model.config.get("id2label") or {}
    else:
        names = dict(enumerate(getattr(getattr(model, "config", None), "labels", ())))
    known = {int(number): str(label) for number, label in names.items()}
    return [known.get(number, f"class {number}") for number in range(num_classes)]


def prepare_images(predictor: Predictor, images: Image | Sequence[Image]) -> Tensor:
    """Resize, crop and normalize images to the (N, C, H, W) that a classifier takes."""
    settings = (_read_beside(predictor.folder, "preprocessor_config.json") if predictor.folder else None) or {}
    fitting = _read_fitting(settings, _image_size(predictor.module))
    mean = torch.tensor(settings.get("image_mean", IMAGENET_MEAN))[:, None, None]
    deviation = torch.tensor(settings.get("image_std", IMAGENET_STD))[:, None, None]
    is_normalized = settings.get("do_normalize", True)
    prepared = [_fit(image_CHW, fitting) for image_CHW in read_images(images)]
    return torch.stack([(image - mean) / deviation if is_normalized else image for image in prepared])


@dataclass(frozen=True)
class _Fitting:
    """The steps that give an image of any size a classifier's size."""

    shorter: int | None
    """Length of the shorter side after resizing, the other in proportion; none takes `exact`."""
    exact: tuple[int, int] | None
    """Height and width after resizing, whatever the proportions; none leaves the size."""
    crop: tuple[int, int] | None
    """Height and width of the middle that is cut out."""
    interpolation: str


def _read_fitting(settings: dict[str, Any], size: int) -> _Fitting:
    """Read the steps from a `preprocessor_config.json`, or without one take those of torchvision and timm."""
    if not settings:
        return _Fitting(round(size / CROP_SHARE), None, (size, size), "bilinear")
    interpolation = _INTERPOLATIONS.get(settings.get("resample", 2))
    if interpolation is None:
        raise ConfigError(
            f"preprocessor_config.json has resample={settings['resample']}; bilinear and bicubic are known"
        )
    edges = _read_edges(settings.get("size", size))
    crop = _read_edges(settings.get("crop_size", edges)) if settings.get("do_center_crop") else None
    if not settings.get("do_resize", True):
        return _Fitting(None, None, crop, interpolation)
    if edges[0] != edges[1] or not _names_shorter(settings.get("size")):
        return _Fitting(None, edges, crop, interpolation)
    share = settings.get("crop_pct")
    if share and edges[0] < _LARGE_EDGE:  # ConvNeXt and ResNet: resized by the share, then cropped
        return _Fitting(int(edges[0] / share), None, edges, interpolation)
    return _Fitting(None, edges, crop, interpolation) if share else _Fitting(edges[0], None, crop, interpolation)


_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # as Pillow numbers them
_LARGE_EDGE = 384


def _names_shorter(size: Any) -> bool:
    return isinstance(size, dict) and "shortest_edge" in size


def _read_edges(size: Any) -> tuple[int, int]:
    """Read height and width from a setting that is a number, a shorter edge, or both."""
    if isinstance(size, dict):
        return (size["shortest_edge"],) * 2 if "shortest_edge" in size else (size["height"], size["width"])
    return tuple(size) if isinstance(size, list | tuple) else (int(size), int(size))


def _image_size(module: nn.Module | None) -> int:
    config: Any = getattr(module, "config", None)
    size = config.get("image_size") if isinstance(config, dict) else getattr(config, "image_size", None)
    return size if isinstance(size, int) else 224


def _fit(image_CHW: Tensor, fitting: _Fitting) -> Tensor:
    height, width = image_CHW.shape[1:]
    target = fitting.exact or (height, width)
    if fitting.shorter is not None:
        scale = fitting.shorter / min(height, width)
        target = (max(fitting.shorter, int(height * scale)), max(fitting.shorter, int(width * scale)))
    scaled = F.interpolate(image_CHW[None], target, mode=fitting.interpolation, antialias=True)[0].clamp(0, 1)
    crop = fitting.crop or target
    if crop[0] > target[0] or crop[1] > target[1]:
        raise ConfigError(f"an image of {target} has no middle of {crop}; give a larger one, or mend crop_size")
    top, left = (target[0] - crop[0]) // 2, (target[1] - crop[1]) // 2
    return scaled[:, top : top + crop[0], left : left + crop[1]]


# ---- what they share


def read_images(images: Image | Sequence[Image]) -> list[Tensor]:
    """Read images (3, H, W) with values in [0, 1], from paths or tensors; raises `ConfigError` for another shape."""
    return [_read_one(image) for image in _as_list(images)]


def _as_list(inputs: Image | Sequence[Image]) -> list[Image]:
    if isinstance(inputs, str | Path) or (isinstance(inputs, Tensor) and inputs.dim() == 3):
        return [inputs]
    return list(inputs)


def _read_one(image: Image) -> Tensor:
    if not isinstance(image, Tensor):
        return read_image(image)
    if image.dim() != 3 or image.shape[0] != 3:
        raise ConfigError(f"an image is {tuple(image.shape)}; give (3, height, width), or the path of a file")
    return image.float() / 255 if image.dtype is torch.uint8 else image


def run_in_batches(predictor: Predictor, *tensors: Tensor) -> Tensor:
    """Run all rows of `tensors`, a batch at a time; the last batch is filled up where the number is fixed."""
    size = predictor.fixed[0] if predictor.fixed else BATCH_SIZE
    answers = []
    with torch.inference_mode():
        for start in range(0, len(tensors[0]), size):
            batch = [tensor[start : start + size] for tensor in tensors]
            num_rows = len(batch[0])
            if predictor.fixed and num_rows < size:
                batch = [torch.cat([rows, rows[-1:].expand(size - num_rows, *rows.shape[1:])]) for rows in batch]
            answers.append(predictor.run(*batch)[:num_rows])
    return torch.cat(answers)


def _read_beside(folder: Path, name: str) -> Any:
    """Return the content of a JSON file beside the weights; `None` where there is no such file."""
    path = folder / name
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptArtifactError(f"{path} is not valid JSON ({error}); download it again") from error


def find_task(module: nn.Module | None) -> str:
    """Name what is asked of a model by default: `detect`, `embed`, `answer`, `estimate` or `classify`."""
    if isinstance(module, YOLOv7):
        return "detect"
    if isinstance(module, TransformersModel) and module.is_text and not module.has_head:
        return "embed"
    if answers_questions(module):
        return "answer"
    return "estimate" if is_regression(module) else "classify"
