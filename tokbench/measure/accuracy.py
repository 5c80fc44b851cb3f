"""What models answer, image by image, in one pass over the images for all of them.

Top-1, the drop and their intervals are made of these answers in `running.figures`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokbench.measure._model import evaluation_mode, is_out_of_memory, release_memory
from tokbench.measure.neighbors import Neighbors
from tokbench.results.predictions import Predictions, join

# How often answers are fetched from the device: often enough to lose little, seldom enough not to keep it waiting.
FETCH_SECONDS = 0.5
# What models answered to a batch, by model and by the field of Predictions: (B,) each, on the device.
_Answers = dict[str, dict[str, Tensor]]


def evaluate(
    models: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    prepare: Callable[[Tensor], Tensor] | None = None,
    classifier: bool = True,
    among: Sequence[int] | None = None,
    neighbors: Neighbors | None = None,
    batch_sizes: dict[str, int] | None = None,
    on_batch: Callable[[dict[str, Predictions]], None] | None = None,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> dict[str, Predictions]:
    """Show every batch to every model while it is there; what each answered comes back under its name.

    `batches` yields images (B, C, H, W), preprocessed, or something of which `prepare` makes such on the device, and
    class indices (B,), −1 for none. The models must be on `device` and take `dtype` already: images are moved there,
    models never. They run in eval mode, and have their own modes back afterwards. The first model is the one that all
    are compared with; `classifier` False says that what comes out are features and not logits. `among` are the classes
    to choose from (ascending, all labels among them): the other logits are left out, as in what is published for
    ImageNet-A and -R. `neighbors` keeps features, which then tell what k-NN makes of each image. `on_batch` is given
    what the models answered to the batches since it was last called, also where an exception ends the pass.
    A model that runs out of memory gets half as many images at a time from there on; `batch_sizes` says, by name,
    how many each may get at most, and is kept up to date.
    A model that raises is reported to `on_failure`, left out from there on, and missing from the result;
    without `on_failure` the exception goes through. Raises ValueError when there are no images.
    """
    running, reference = dict(models), next(iter(models), "")
    device = torch.device(device)
    chosen = None if among is None else torch.tensor(among, device=device)
    batch_sizes = {} if batch_sizes is None else batch_sizes
    waiting: list[tuple[Tensor, _Answers]] = []
    fetched: list[dict[str, Predictions]] = []

    def show(images: Tensor, labels: Tensor) -> _Answers:
        try:
            moved, known = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            moved = (prepare(moved) if prepare else moved).to(dtype)
        except Exception as error:
            if not is_out_of_memory(error) or len(images) == 1:
                raise
        else:
            highest = int(labels.max())
            return _answers(
                running, reference, moved, known, highest, classifier, chosen, neighbors, batch_sizes, on_failure
            )
        release_memory(device)
        half = (len(images) + 1) // 2
        batch_sizes.update({name: min(batch_sizes.get(name, half), half) for name in running})
        first, second = show(images[:half], labels[:half]), show(images[half:], labels[half:])
        return {
            name: {field: torch.cat([first[name][field], values]) for field, values in own.items()}
            for name, own in second.items()
        }

    def fetch() -> None:
        taken = waiting[:]
        waiting.clear()
        if taken:
            fetched.append(_fetched(taken, list(running), classifier))
            if on_batch is not None:
                on_batch(fetched[-1])

    with torch.inference_mode(), evaluation_mode(models.values()):
        try:
            began, before = time.monotonic(), _Moment(device)
            for images, labels in batches:
                labels = labels.long().cpu()
                waiting.append((labels, show(images, labels)))
                # One batch is always queued on the device, and never more: else it would seem to be images that are
                # waited for.
                before.reached()
                before = _Moment(device)
                if time.monotonic() - began >= FETCH_SECONDS:
                    fetch()
                    began = time.monotonic()
        except BaseException:
            if reference in running:
                fetch()
            raise
        fetch()
    if not fetched:
        raise ValueError("there are no images to evaluate on")
    results = {name: join(part[name] for part in fetched) for name in running}
    if neighbors is not None:
        for name, own in results.items():
            own.neighbor[:] = neighbors.classes(name, torch.from_numpy(own.label)).numpy()
    return results


class _Moment:
    """When a CUDA device will have done what it was given until now; other devices have nothing to wait for."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))

    def reached(self) -> None:
        """Wait for it."""
        if self._event is not None:
            self._event.synchronize()


def _fetched(parts: list[tuple[Tensor, _Answers]], names: list[str], classifier: bool) -> dict[str, Predictions]:
    """What these models answered to batches with these labels; an accelerator is waited for."""
    labels = torch.cat([given for given, _ in parts]).numpy()
    found = {}
    for name in names:
        own = [answers[name] for _, answers in parts]
        fields = {field: torch.cat([part[field] for part in own]).cpu().numpy() for field in own[0]}
        found[name] = Predictions(labels, **fields, classifies="output" not in fields and classifier)
    return found


def _answers(
    running: dict[str, nn.Module],
    reference: str,
    images: Tensor,
    labels: Tensor,
    highest: int,
    classifier: bool,
    among: Tensor | None,
    neighbors: Neighbors | None,
    batch_sizes: dict[str, int],
    on_failure: Callable[[str, Exception], None] | None,
) -> _Answers:
    """Every running model's answers to one batch; models that fail are taken out of `running`.

    All on the device, which nothing here waits for. highest: of the labels.
    """
    answers: _Answers = {}
    if among is not None:
        labels, highest = torch.searchsorted(among, labels).where(labels >= 0, -1), -1  # all labels are among them
    compared: Tensor | None = None
    for name, model in list(running.items()):
        try:
            output = _output(name, model, images, batch_sizes)
            if among is not None:
                output = output[:, among]
            if name == reference:
                compared = output
            if neighbors is not None:
                neighbors.add(name, output)
            if not classifier:
                answers[name] = _without_classes(output, labels) | _distance(output, compared, classifier)
            elif output.shape[1] == 1:
                answers[name] = _without_classes(output, labels) | _one_output(output)
            else:
                answers[name] = _read_off(output, labels, highest) | _distance(output, compared, classifier)
        except Exception as error:
            if on_failure is None:
                raise
            del running[name]
            on_failure(name, error)
        else:
            if among is not None:
                predicted = answers[name]["predicted"]
                answers[name]["predicted"] = among[predicted].where(predicted >= 0, -1)
    return answers


def _output(name: str, model: nn.Module, images: Tensor, batch_sizes: dict[str, int]) -> Tensor:
    """What a model makes of a batch, in as many pieces as its memory asks for: (B, D), float32 at least."""
    while True:
        size = min(batch_sizes.get(name, len(images)), len(images))
        try:
            pieces = [model(some) for some in images.split(size)]
        except Exception as error:
            if not is_out_of_memory(error) or size == 1:
                raise
            batch_sizes[name] = (size + 1) // 2
        else:
            output = torch.cat(pieces)
            return output.to(torch.promote_types(output.dtype, torch.float32))
        # Only here: while the exception is being handled, its frames still hold what filled the memory.
        release_memory(images.device)


def _read_off(logits: Tensor, labels: Tensor, highest: int) -> dict[str, Tensor]:
    """What Predictions says of one model's logits (B, classes) by themselves: (B,) each, on the logits' device."""
    batch, classes = logits.shape
    if batch != len(labels):
        raise ValueError(f"the model gave {batch} answers to {len(labels)} images")
    # Here and not by CUDA, whose whole context an index out of range would take down.
    if highest >= classes:
        raise ValueError(f"label {highest} is out of range: the model has {classes} classes")
    finite = logits.isfinite().all(dim=1)
    predicted = logits.argmax(dim=1).where(finite, -1)
    probability = logits.softmax(dim=1).gather(1, labels.clamp_min(0)[:, None])[:, 0].float()
    five = logits.topk(min(5, classes), dim=1).indices
    # With many equal logits topk may leave out the one that argmax takes.
    top5 = (five == labels[:, None]).any(dim=1) | (predicted == labels)
    known = finite & (labels >= 0)
    return {
        "predicted": predicted,
        "label_probability": probability.where(known, float("nan")),
        "top5": top5 & known,
    }


def _without_classes(features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """`_read_off` for features (B, D): nothing is predicted."""
    nothing = torch.full((len(labels),), -1, device=features.device)
    return {"predicted": nothing, "label_probability": nothing * float("nan"), "top5": nothing > 0}


def _one_output(output: Tensor) -> dict[str, Tensor]:
    """The output (B, 1) itself: softmax and argmax of one number are 1 and 0 whatever it is."""
    value = output[:, 0].float()
    return {"output": value.where(value.isfinite(), float("nan"))}


def _distance(output: Tensor, compared: Tensor | None, classifier: bool) -> dict[str, Tensor]:
    """How far logits or features (B, D) are from the unreduced model's, (B,) each."""
    unknown = output.new_full((len(output),), float("nan"), dtype=torch.float32)
    if compared is None:
        return {"divergence": unknown, "similarity": unknown}
    if not classifier:
        return {"divergence": unknown, "similarity": F.cosine_similarity(output, compared, dim=1).float()}
    log_p, log_q = compared.log_softmax(dim=1), output.log_softmax(dim=1)
    return {"divergence": (log_p.exp() * (log_p - log_q)).sum(dim=1).float(), "similarity": unknown}
