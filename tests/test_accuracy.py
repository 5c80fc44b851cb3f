"""Predictions image by image, one pass for all models, and what happens when one of them fails."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy, pearsonr
from torch import Tensor, nn

from tokbench.measure import accuracy, neighbors
from tokbench.measure._model import is_out_of_memory
from tokbench.measure.accuracy import evaluate
from tokbench.measure.neighbors import Neighbors
from tokbench.measure.stats import correlation_interval
from tokbench.results import predictions
from tokbench.results.predictions import ARRAYS, Predictions, join
from tokbench.running.figures import accuracy_fields

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


class Table(nn.Module):
    """Answers image number i, which holds i in every pixel, with the i-th row of logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)
        self.modes: list[bool] = []
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.modes.append(self.training)
        self.batches.append(len(images))
        assert torch.is_inference_mode_enabled()
        logits: Tensor = self.logits[images[:, 0, 0, 0].long()]
        return logits


def numbered(labels: list[int], batch: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(labels), batch):
        part = labels[start : start + batch]
        yield torch.arange(start, start + len(part)).float().view(-1, 1, 1, 1), torch.tensor(part)


def random_logits(images: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randn(images, classes, generator=torch.Generator().manual_seed(seed))


def test_answers_match_numpy() -> None:
    logits, labels = random_logits(30, 12), [index % 12 for index in range(30)]
    answers = evaluate({"a": Table(logits)}, numbered(labels), device=CPU)["a"]
    table, truth = logits.numpy(), np.array(labels)
    exponentials = np.exp(table - table.max(axis=1, keepdims=True))
    probability = exponentials / exponentials.sum(axis=1, keepdims=True)
    rank = (table > table[np.arange(30), truth][:, None]).sum(axis=1)
    assert np.array_equal(answers.label, truth)
    assert np.array_equal(answers.predicted, table.argmax(axis=1))
    assert np.allclose(answers.label_probability, probability[np.arange(30), truth], rtol=1e-5)
    assert np.array_equal(answers.top5, rank < 5)
    assert answers.top1() == (rank == 0).mean()
    assert answers.top5_accuracy() == (rank < 5).mean()
    types = [answers.label, answers.predicted, answers.label_probability, answers.top5]
    assert [array.dtype for array in types] == [np.int64, np.int64, np.float32, np.bool_]


def test_one_pass_for_all_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "FETCH_SECONDS", 0)
    models = {"a": Table(random_logits(10, 3)), "b": Table(random_logits(10, 3, seed=1))}
    seen: list[dict[str, Predictions]] = []
    results = evaluate(models, numbered([0] * 10), device=CPU, on_batch=seen.append)
    assert list(results) == ["a", "b"]
    assert [list(answers) for answers in seen] == [["a", "b"]] * 3
    assert np.array_equal(join(answers["b"] for answers in seen).predicted, results["b"].predicted)
    assert models["a"].batches == models["b"].batches == [4, 4, 2]
    alone = evaluate({"b": models["b"]}, numbered([0] * 10, batch=1), device=CPU)["b"]
    assert np.array_equal(alone.predicted, results["b"].predicted)


@pytest.mark.parametrize("last", [3, 8, 12])
def test_answers_are_fetched_seldom_and_none_is_lost_where_the_pass_ends_early(monkeypatch, last: int) -> None:
    monkeypatch.setattr(accuracy, "FETCH_SECONDS", 1e9)
    models = {"a": Table(random_logits(12, 3)), "bad": Fragile(random_logits(12, 3))}
    seen: list[dict[str, Predictions]] = []

    def interrupted() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in numbered([0] * 12):
            if images[0] >= last:
                raise KeyboardInterrupt
            yield images.to(torch.uint8), labels
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(
            models, interrupted(), device=CPU, prepare=lambda images: images.float(),
            on_batch=seen.append, on_failure=lambda *_: None,
        )  # fmt: skip
    whole = evaluate({"a": models["a"]}, numbered([0] * 12), device=CPU)["a"]
    complete = -(-last // 4) * 4
    assert [list(answers) for answers in seen] == [["a", "bad"] if complete == 4 else ["a"]]
    assert np.array_equal(seen[0]["a"].label_probability, whole.label_probability[:complete])


def test_modes_come_back() -> None:
    model = Table(random_logits(4, 3)).train()
    model.add_module("frozen", nn.Dropout().eval())
    evaluate({"a": model}, numbered([0] * 4), device=CPU)
    assert model.modes == [False]
    assert [module.training for module in model.modules()] == [True, False]


def test_unlabelled_images_are_never_correct() -> None:
    logits = torch.eye(3)
    answers = evaluate({"a": Table(logits)}, numbered([0, -1, 2]), device=CPU)["a"]
    assert answers.predicted.tolist() == [0, 1, 2]
    assert answers.correct.tolist() == [True, False, True]
    assert answers.top5.tolist() == [True, False, True]
    assert np.isnan(answers.label_probability).tolist() == [False, True, False]
    assert answers.top1() == 1


def test_logits_that_are_not_finite_are_never_correct() -> None:
    logits = torch.eye(4)
    logits[1, 2], logits[2, 2], logits[3, 0] = float("nan"), float("inf"), float("-inf")
    answers = evaluate({"a": Table(logits)}, numbered([0, 1, 2, -1]), device=CPU)["a"]
    assert answers.predicted.tolist() == [0, -1, -1, -1]
    assert answers.correct.tolist() == answers.top5.tolist() == [True, False, False, False]
    assert np.isnan(answers.label_probability).tolist() == [False, True, True, True]


def test_few_classes_and_ties() -> None:
    answers = evaluate({"a": Table(random_logits(6, 2))}, numbered([0, 1] * 3), device=CPU)["a"]
    assert answers.top5_accuracy() == 1
    tied = evaluate({"a": Table(torch.zeros(20, 20))}, numbered(list(range(20))), device=CPU)["a"]
    assert set(tied.predicted) == {0}
    assert tied.top5[tied.correct].all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_probabilities_are_computed_in_float32_at_least(dtype: torch.dtype) -> None:
    logits, labels = random_logits(8, 5).to(dtype), [0, 1, 2, 3, 4, 0, 1, 2]
    answers = evaluate({"a": Table(logits)}, numbered(labels), device=CPU, dtype=dtype)["a"]
    exact = logits.double().softmax(dim=1)[torch.arange(8), torch.tensor(labels)].numpy()
    assert answers.label_probability.dtype == np.float32
    assert np.allclose(answers.label_probability, exact, rtol=1e-6)


class Fragile(Table):
    """Fails from its second batch on."""

    def forward(self, images: Tensor) -> Tensor:
        if self.batches:
            raise RuntimeError("out of memory")
        return super().forward(images)


def test_a_model_that_fails_is_left_out() -> None:
    models = {"good": Table(random_logits(12, 3)), "bad": Fragile(random_logits(12, 3))}
    failures: list[tuple[str, str]] = []
    results = evaluate(
        models,
        numbered([0] * 12),
        device=CPU,
        on_failure=lambda name, error: failures.append((name, str(error))),
    )
    assert failures == [("bad", "out of memory")]
    assert list(results) == ["good"]
    assert len(results["good"].label) == 12


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (torch.OutOfMemoryError(""), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_batch_too_large_to_be_moved_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"a": Table(random_logits(10, 3)), "b": Table(random_logits(10, 3, seed=1))}
    plain = evaluate(models, numbered([0] * 10), device=CPU)
    move = Tensor.to

    def cramped(self: Tensor, *where: object, non_blocking: bool = False, **named: object) -> Tensor:
        if non_blocking and len(self) > 1:
            raise torch.OutOfMemoryError("no room")
        return move(self, *where, non_blocking=non_blocking, **named)

    sizes: dict[str, int] = {}
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "to", cramped)
        halved = evaluate(models, numbered([0] * 10), device=CPU, classifier=False, batch_sizes=sizes)
    features = evaluate(models, numbered([0] * 10), device=CPU, classifier=False)
    assert sizes == {"a": 1, "b": 1}
    assert len(plain["a"].label) == len(halved["a"].label)
    assert np.array_equal(halved["b"].similarity, features["b"].similarity)


def test_memory_does_not_grow_with_the_images() -> None:
    """What lives while batches come are the batch at hand and a few numbers for each image."""

    def peak(images: int) -> int:
        alive: list[int] = []

        class Spy(Table):
            def forward(self, batch: Tensor) -> Tensor:
                tensors = [one for one in gc.get_objects() if type(one) is Tensor]
                alive.append(sum(one.numel() * one.element_size() for one in tensors))
                return super().forward(batch % 8)

        gc.collect()
        gc.freeze()  # what was there before is not looked at
        spies = {name: Spy(random_logits(8, 1000)) for name in "ab"}
        batches = ((torch.full((4, 3, 64, 64), float(start)), torch.zeros(4).long()) for start in range(0, images, 4))
        evaluate(spies, batches, device=CPU)
        assert len(alive) == images // 2
        return max(alive)

    few, many = peak(32), peak(128)
    assert 4 * 3 * 64 * 64 * 4 < many < few + 96 * 200


def test_without_a_handler_failures_go_through() -> None:
    model = Fragile(random_logits(12, 3)).train()
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate({"bad": model}, numbered([0] * 12), device=CPU)
    assert model.training


def test_labels_and_answers_must_fit() -> None:
    with pytest.raises(ValueError, match="label 3 is out of range: the model has 3 classes"):
        evaluate({"a": Table(torch.eye(3))}, numbered([0, 3, 1]), device=CPU)
    with pytest.raises(ValueError, match="gave 1 answers to 2 images"):
        pooled = nn.Flatten(0), nn.Unflatten(0, (1, 2))
        evaluate({"a": nn.Sequential(*pooled)}, [(torch.zeros(2, 1, 1, 1), torch.zeros(2))], device=CPU)
    with pytest.raises(ValueError, match="no images"):
        evaluate({"a": Table(torch.eye(3))}, [], device=CPU)


def test_save_and_load(tmp_path: Path) -> None:
    answers = evaluate({"a": Table(random_logits(9, 3))}, numbered([0, -1, 2] * 3), device=CPU)["a"]
    path = tmp_path / "tome_constant-13.npz"
    answers.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    again = Predictions.load(path)
    for name in ARRAYS:
        before, after = getattr(answers, name), getattr(again, name)
        assert before.dtype == after.dtype
        assert np.array_equal(before, after, equal_nan=before.dtype == np.float32)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_answers() -> None:
    logits, labels = random_logits(30, 12), [(7 * index) % 13 - 1 for index in range(30)]
    here = evaluate({"a": Table(logits)}, numbered(labels), device=CPU)["a"]
    there = evaluate({"a": Table(logits).cuda()}, numbered(labels), device="cuda")["a"]
    assert np.array_equal(here.predicted, there.predicted)
    assert np.array_equal(here.top5, there.top5)
    assert np.allclose(here.label_probability, there.label_probability, rtol=1e-5, equal_nan=True)
    with pytest.raises(ValueError, match="out of range"):
        evaluate({"a": Table(torch.eye(3)).cuda()}, numbered([3]), device="cuda")


def test_divergence_from_the_first_model_matches_scipy() -> None:
    tables = {"none": random_logits(9, 6), "tome": random_logits(9, 6, seed=1)}
    tables["tome"][4, 0] = float("nan")
    results = evaluate({name: Table(table) for name, table in tables.items()}, numbered([0] * 9), device=CPU)
    p, q = (softmax(table.double().numpy(), axis=1) for table in tables.values())
    exact = entropy(p, q, axis=1)
    assert results["none"].divergence == pytest.approx(np.zeros(9), abs=1e-6)
    assert np.allclose(results["tome"].divergence, exact, rtol=1e-4, equal_nan=True)
    assert np.isnan(results["tome"].divergence).sum() == 1
    assert results["tome"].classifies and np.isnan(results["tome"].similarity).all()


def test_a_model_without_a_classifier_is_compared_by_its_features() -> None:
    tables = {"none": random_logits(9, 6), "tome": random_logits(9, 6, seed=1)}
    tables["tome"][4, 0] = float("inf")
    models = {name: Table(table) for name, table in tables.items()}
    results = evaluate(models, numbered([-1] * 9), device=CPU, classifier=False)
    a, b = (table.double().numpy() for table in tables.values())
    with np.errstate(invalid="ignore"):
        exact = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert np.allclose(results["tome"].similarity, exact, rtol=1e-4, equal_nan=True)
    assert results["none"].similarity == pytest.approx(np.ones(9))
    assert not results["tome"].classifies and results["tome"].nonfinite() == 1 and results["none"].nonfinite() == 0


@pytest.mark.parametrize("classifier", [True, False])
def test_answers_that_are_all_nan_are_told_from_those_of_a_model_without_classes(classifier, tmp_path: Path) -> None:
    tables = {"none": random_logits(6, 4), "lost": torch.full((6, 4), float("nan"))}
    models = {name: Table(table) for name, table in tables.items()}
    lost = evaluate(models, numbered([0] * 6), device=CPU, classifier=classifier)["lost"]
    lost.save(tmp_path / "lost.npz")
    for answers in (lost, join([lost, lost]), lost.take(np.array([4, 0])), Predictions.load(tmp_path / "lost.npz")):
        assert answers.classifies is classifier
        assert answers.nonfinite() == len(answers.label)
        assert answers.top1() == 0


def test_a_model_of_one_output_is_told_by_how_far_it_moves() -> None:
    unreduced = torch.tensor([[-1.0], [0.0], [1.0], [2.0], [3.0], [float("nan")]])
    tables = {"none": unreduced, "moved": unreduced + 0.5, "turned": -unreduced, "deaf": torch.zeros(6, 1)}
    found = evaluate({name: Table(table) for name, table in tables.items()}, numbered([0, 1, -1, 0, 1, 0]), device=CPU)
    assert not any(answers.classifies or answers.labeled and answers.top1() for answers in found.values())
    assert found["none"].nonfinite() == 1 and found["deaf"].nonfinite() == 0
    spread = np.std([-1, 0, 1, 2, 3], ddof=1)
    fields = {name: accuracy_fields(answers, found["none"]) for name, answers in found.items()}
    assert all(not own.keys() & {"top1", "drop", "agreement", "kl", "similarity"} for own in fields.values())
    assert fields["none"]["output_shift"] == 0 and fields["none"]["output_correlation"] == pytest.approx(1)
    assert fields["moved"]["output_shift"] == pytest.approx(0.5 / spread)
    assert fields["turned"]["output_correlation"] == pytest.approx(-1)
    assert fields["turned"]["output_shift"] == pytest.approx(np.mean([2, 0, 2, 4, 6]) / spread)
    assert (
        fields["turned"]["output_shift_low"] < fields["turned"]["output_shift"] < fields["turned"]["output_shift_high"]
    )
    assert "output_correlation" not in fields["deaf"]  # it says the same of every image


def test_the_interval_of_a_correlation_is_fishers() -> None:
    first = np.arange(20.0)
    second = first + 8 * np.sin(7 * first)
    r, low, high = correlation_interval(first, second)
    assert r == pytest.approx(pearsonr(first, second).statistic)
    expected = pearsonr(first, second).confidence_interval(0.95)
    assert (low, high) == pytest.approx((expected.low, expected.high))


def test_answers_are_chosen_among_some_classes_as_if_the_model_had_no_others() -> None:
    logits, labels, among = random_logits(30, 12), [2, 5, 9, 11, -1] * 6, [2, 5, 9, 11]
    models = {"none": Table(logits), "cell": Table(logits.roll(1, dims=1))}
    few = {name: Table(model.logits[:, among]) for name, model in models.items()}
    found = evaluate(models, numbered(labels), device=CPU, among=among)["cell"]
    expected = evaluate(few, numbered([among.index(n) if n >= 0 else -1 for n in labels]), device=CPU)["cell"]
    assert found.label.tolist() == labels and found.predicted.tolist() == [among[n] for n in expected.predicted]
    for name in ("label_probability", "top5", "divergence"):
        assert np.array_equal(getattr(found, name), getattr(expected, name), equal_nan=True)


def test_images_without_a_label_count_in_no_accuracy_and_no_interval() -> None:
    logits = random_logits(40, 3)
    labels = logits.argmax(dim=1)
    labels[::4] = (labels[::4] + 1) % 3
    labels[1::2] = -1
    models = {"none": Table(logits), "cell": Table(logits.roll(1, dims=1))}
    every = evaluate(models, numbered(labels.tolist()), device=CPU)
    few = {name: answers.with_label() for name, answers in every.items()}
    told, expected = (accuracy_fields(answers["cell"], answers["none"]) for answers in (every, few))
    assert (told.pop("images"), told.pop("unlabelled")) == (40, 20) and expected.pop("images") == 20
    of_all = {name for name in told if name.startswith(("agreement", "kl"))}
    assert {k: v for k, v in told.items() if k not in of_all} == {k: v for k, v in expected.items() if k not in of_all}
    assert every["none"].top1() == 0.5 == few["none"].correct.mean()


def test_archives_from_before_there_were_divergences_are_read(tmp_path: Path) -> None:
    own = evaluate({"a": Table(random_logits(5, 4))}, numbered([0] * 5), device=CPU)["a"]
    old = ("label", "predicted", "label_probability", "top5")
    np.savez(tmp_path / "old.npz", **{name: getattr(own, name) for name in old})
    read = Predictions.load(tmp_path / "old.npz")
    assert np.array_equal(read.predicted, own.predicted) and np.isnan(read.divergence).all() and read.classifies
    features = evaluate({"a": Table(random_logits(5, 4))}, numbered([-1] * 5), device=CPU, classifier=False)["a"]
    np.savez(tmp_path / "features.npz", **{name: getattr(features, name) for name in ARRAYS})
    assert not Predictions.load(tmp_path / "features.npz").classifies


class _Hostile:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_archives_that_hold_no_answers_are_refused(tmp_path: Path, monkeypatch) -> None:
    """Whatever somebody made of them: neither unpickled nor taken for answers, and no bomb is unpacked."""
    good = {
        "label": np.arange(4), "predicted": np.arange(4), "label_probability": np.ones(4, np.float32),
        "top5": np.ones(4, bool),
    }  # fmt: skip
    path = tmp_path / "answers.npz"
    np.savez_compressed(path, **good)
    assert Predictions.load(path).top1() == 1
    whole = path.read_bytes()
    changes = {
        "label": np.array([_Hostile(tmp_path / "made")] * 4, dtype=object), "predicted": np.arange(3),
        "top5": np.ones((4, 1), bool), "label_probability": np.array(["x"] * 4),
    }  # fmt: skip
    for name, array in changes.items():
        np.savez(path, **{**good, name: array})
        with pytest.raises(ValueError, match=f"its array {name!r} is|Object arrays cannot be loaded"):
            Predictions.load(path)
    assert not (tmp_path / "made").exists()
    np.savez(path, label=np.arange(4))
    with pytest.raises(ValueError, match="it has no array 'predicted'"):
        Predictions.load(path)
    encrypted = bytearray(whole)
    encrypted[whole.find(b"PK\1\2") + 8] |= 1
    for content in (b"", b"text", whole[:300], bytes(encrypted)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="it is no archive of arrays, or damaged"):
            Predictions.load(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="no regular file"):
        Predictions.load(path)
    path.unlink()
    path.write_bytes(whole)
    monkeypatch.setattr(predictions, "LARGEST_ARCHIVE", 100)
    with pytest.raises(ValueError, match="unpacked it would be larger than"):
        Predictions.load(path)


def test_k_nn_is_dinos_on_the_other_images() -> None:
    features, labels = random_logits(60, 5), torch.arange(60) % 4
    labels[7], features[11, 2] = -1, float("nan")
    unit = features.double().numpy() / np.linalg.norm(features.double().numpy(), axis=1, keepdims=True)
    expected = []
    for image in range(60):
        others = [i for i in range(60) if i not in (7, 11, image)]
        nearest = sorted(others, key=lambda i: -unit[image] @ unit[i])[:20]
        votes = np.zeros(4)
        for i in nearest:
            votes[labels[i]] += np.exp(unit[image] @ unit[i] / 0.07)
        expected.append(-2 if image == 7 else -1 if image == 11 else int(votes.argmax()))
    models = {"none": Table(features), "cell": Table(features.flip(1))}
    keeps = Neighbors(60, 2)
    found = evaluate(models, numbered(labels.tolist()), device=CPU, classifier=False, neighbors=keeps)
    assert found["none"].neighbor.tolist() == expected == found["cell"].neighbor.tolist()
    fields = accuracy_fields(found["cell"], found["none"])
    right = sum(a == b for a, b in zip(expected, labels.tolist(), strict=True))
    assert (fields["knn_top1"], fields["knn_images"], fields["knn_drop"]) == (right / 59, 59, 0)
    assert fields["knn_drop_low"] < 0 < fields["knn_drop_high"] and "top1" not in fields
    perfect = Predictions(**{**vars(found["none"]), "neighbor": np.where(labels < 0, -2, labels)})
    assert accuracy_fields(found["cell"], perfect)["knn_drop"] == pytest.approx(100 * (1 - right / 59))
    unlabelled = evaluate(models, numbered([-1] * 60), device=CPU, classifier=False, neighbors=Neighbors(60, 2))["none"]
    assert "knn_top1" not in accuracy_fields(unlabelled, unlabelled)


def test_features_of_too_many_images_are_thinned_evenly(monkeypatch) -> None:
    features, labels = random_logits(60, 5), torch.arange(60) % 4
    monkeypatch.setattr(neighbors, "LARGEST_BYTES", 60 * 5 * 2 // 3 + 1)
    keeps = Neighbors(60, 1)
    for start in range(0, 60, 7):
        keeps.add("none", features[start : start + 7])
    found = keeps.classes("none", labels)
    assert keeps.step == 3 and (found == -2).sum() == 40
    unit = torch.nn.functional.normalize(features[::3], dim=1).half()
    assert found[::3].tolist() == neighbors.weighted_knn(unit, labels[::3]).tolist()
