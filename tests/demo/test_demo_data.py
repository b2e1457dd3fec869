"""The demo's splits and tasks."""

from __future__ import annotations

import numpy as np
import pytest

from foldd.daemon.demo import data


def test_splits_share_no_image_and_cover_all() -> None:
    train, validation, test = data.split_indices()
    rows = np.concatenate([train, validation, test])
    assert (len(train), len(validation), len(test)) == (1000, 300, 497)
    assert sorted(rows) == list(range(1797))


def test_the_base_never_sees_a_test_image_of_any_task() -> None:
    """By content, too: the plain tasks' held-back images are in no training image of the base."""
    seen = {image.tobytes() for image in data.base_data().train.images}
    for task in data.task_data():
        assert not seen & {image.tobytes() for image in task.test.images}


def test_calibration_comes_from_training_images_only() -> None:
    for task in data.task_data():
        calibration = {image.tobytes() for image in task.train.images[: data.CALIBRATION]}
        assert len(calibration) == data.CALIBRATION
        assert not calibration & {image.tobytes() for image in task.test.images}


def test_six_tasks_with_all_their_classes_in_every_split() -> None:
    tasks = data.task_data()
    assert tuple(task.name for task in tasks) == data.TASK_NAMES
    assert len(set(data.TASK_NAMES)) == 6
    for task in tasks:
        for split in (task.train, task.validation, task.test):
            assert split.images.shape == (len(split.labels), *data.INPUT_SHAPE)
            assert (split.images.dtype, split.labels.dtype) == (np.float32, np.int64)
            assert set(split.labels) == set(range(len(task.classes)))
        assert np.bincount(task.train.labels).min() >= 10  # shots of the head


def test_the_tasks_are_what_they_say() -> None:
    tasks = {task.name: task for task in data.task_data()}
    plain, digits = tasks["parity"].test.images, tasks["mirrored"].test.labels
    np.testing.assert_array_equal(tasks["parity"].test.labels, digits % 2)
    np.testing.assert_array_equal(tasks["mirrored"].test.images, plain[..., ::-1])
    np.testing.assert_array_equal(tasks["inverted"].test.images, 1 - plain)
    assert tasks["five-to-nine"].test.labels.tolist() == [d - 5 for d in digits if d >= 5]
    assert tasks["loops"].test.labels[digits == 8].tolist() == [2] * int((digits == 8).sum())
    noise = tasks["noisy"].test.images - plain
    assert noise[:, :, ::2, ::2].std() == pytest.approx(data.NOISE, rel=0.02)


def test_the_data_is_the_same_every_time() -> None:
    for first, second in zip(data.task_data(), data.task_data(), strict=True):
        np.testing.assert_array_equal(first.train.images, second.train.images)
        np.testing.assert_array_equal(first.test.labels, second.test.labels)
