"""FantasyPortrait's own detector: decoding, crops and smoothing equal the official code; the ONNX seam."""

import sys

import numpy as np
import pytest
from helpers import DATA
from safetensors.numpy import load_file

from fantasy_jax.errors import ConfigError
from fantasy_jax.preprocessing.alignment import apply_affine
from fantasy_jax.preprocessing.driving import DrivingConfig, kept_frames, open_detector, track_people
from fantasy_jax.preprocessing.landmarks import FaceDetector
from fantasy_jax.preprocessing.official_detectors import (
    OFFICIAL_FACE,
    OfficialFaces,
    crop_matrix_from_box,
    crop_matrix_from_landmarks,
    decode_boxes,
    detector_input,
    resize_matrix,
    suppress_overlaps,
)
from fantasy_jax.preprocessing.one_euro import OFFICIAL_GROUPS, smooth_landmarks

REFERENCE = load_file(DATA / "fantasyportrait_preprocessing" / "activations.safetensors")
HEIGHT, WIDTH = 720, 1280


def test_the_detector_is_decoded_as_officially():
    scores, distances = (
        [REFERENCE[f"input.detector_{kind}_stride{stride}"] for stride in (8, 16, 32)]
        for kind in ("scores", "distances")
    )
    boxes, confidences = decode_boxes(scores, distances, HEIGHT, WIDTH)
    np.testing.assert_array_equal(boxes, REFERENCE["output.detector_boxes"])
    np.testing.assert_array_equal(confidences, REFERENCE["output.detector_confidences"])
    matrix = resize_matrix(HEIGHT, WIDTH)
    np.testing.assert_allclose(matrix, REFERENCE["output.detector_resize_matrix"], atol=1e-12)
    nothing, _ = decode_boxes([0 * x for x in scores], distances, HEIGHT, WIDTH)
    assert nothing.shape == (0, 4)


def test_the_crops_are_the_official_ones():
    box = crop_matrix_from_box(REFERENCE["input.face_box"])
    np.testing.assert_allclose(box, REFERENCE["output.crop_matrix_from_box"], rtol=1e-12, atol=1e-10)
    landmarks = crop_matrix_from_landmarks(REFERENCE["input.landmarks"])
    expected = REFERENCE["output.crop_matrix_from_landmarks"]
    np.testing.assert_allclose(landmarks, expected, rtol=1e-12, atol=1e-10)


def test_smoothing_is_the_official_one():
    track, sizes = REFERENCE["input.landmark_track"], REFERENCE["input.face_sizes"]
    smoothed = smooth_landmarks(track, sizes, OFFICIAL_GROUPS)
    np.testing.assert_allclose(smoothed, REFERENCE["output.smoothed_landmarks"], rtol=1e-12, atol=1e-10)
    assert np.abs(smoothed - track).max() > 0.1


def test_the_number_of_frames_is_cut_to_4k_plus_1_as_officially():
    assert [kept_frames(count) for count in range(31)] == REFERENCE["output.frames_kept_of_0_to_30"].tolist()


def test_of_overlapping_boxes_the_most_confident_remains():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [7, 0, 17, 10], [40, 0, 50, 10]], np.float64)
    assert suppress_overlaps(boxes, np.array([0.5, 0.9, 0.6, 0.7])) == [1, 3, 2]
    assert suppress_overlaps(boxes[:0], np.zeros(0)) == []


def test_the_input_is_bgr_and_black_beside_the_image():
    given = detector_input(np.full((100, 100, 3), (255, 0, 0), np.uint8))
    black = -np.float32([103.53, 116.28, 123.675]) / np.float32([57.375, 57.12, 58.395])
    np.testing.assert_allclose(given[0, :, 0, 0], black, rtol=1e-5)
    np.testing.assert_allclose(given[0, :, 136, 80], black + np.float32([0, 0, 255 / 58.395]), rtol=1e-5)


def save_constants(path, outputs):
    """Writes an ONNX file whose outputs do not depend on its input."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value.astype(np.float32)))
        for name, value in outputs.items()
    ]
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, None, None])
    made = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in outputs.items()
    ]
    graph = helper.make_graph(nodes, "constants", [given], made)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return str(path)


LANDMARKS = 0.075 + 0.85 * np.random.default_rng(0).uniform(size=(222, 2))
LANDMARKS[[74, 96]] = (0.3, 0.4), (0.7, 0.4)


@pytest.fixture
def files(tmp_path):
    """A detector that sees one face of four cells in the middle, and landmarks that lie still in the crop."""
    cells = {8: 680, 16: 170, 32: 45}
    scores = {f"s{stride}": np.zeros((1, count, 1)) for stride, count in cells.items()}
    scores["s8"][0, 17 * 20 + 10] = 0.9
    distances = {f"d{stride}": np.zeros((1, count, 32)) for stride, count in cells.items()}
    distances["d8"].reshape(680, 4, 8)[17 * 20 + 10, :, 4] = 50
    landmarks = {"points": LANDMARKS.T.reshape(1, -1), "euler": np.deg2rad([[9.0, -15.0]])}
    return (
        save_constants(tmp_path / "det.onnx", scores | distances),
        save_constants(tmp_path / "marks.onnx", landmarks | {"probability": np.ones((1, 1))}),
    )


def test_the_networks_find_a_face(files):
    image = np.zeros((544, 320, 3), np.uint8)
    with OfficialFaces(*files) as detector:
        assert isinstance(detector, FaceDetector)
        (face,) = detector.detect(image)
    matrix = crop_matrix_from_box(np.array([96, 208, 224, 336]))
    for _ in range(3):
        crop, inverse = matrix, np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
        points = apply_affine(inverse, LANDMARKS * 128)
        matrix = crop_matrix_from_landmarks(points)
    np.testing.assert_allclose(face.points[:, :2], points, atol=1e-3)
    np.testing.assert_allclose(face.box, [*points.min(axis=0), *points.max(axis=0)], atol=1e-3)
    np.testing.assert_allclose(face.angles, [9, -15], atol=1e-4)
    assert face.confidence == pytest.approx(0.9)
    assert crop.shape == (2, 3)


def test_the_networks_track_people(files):
    config = DrivingConfig(detection_model=files[0], landmark_model=files[1])
    frames = [np.zeros((544, 320, 3), np.uint8)] * 3
    with open_detector(config) as detector:
        assert detector.layout == OFFICIAL_FACE
        (person,) = track_people(frames, detector, config)
        (face,) = detector.detect(frames[0])
    assert person.found.all()
    np.testing.assert_allclose(person.points[0], face.points[[182, 202, 36, 149, 133], :2], rtol=1e-6)


def test_what_the_landmark_network_does_not_see_is_dropped(files, tmp_path):
    landmarks = {"points": LANDMARKS.T.reshape(1, -1), "euler": np.zeros((1, 2))}
    blind = save_constants(tmp_path / "blind.onnx", landmarks | {"probability": np.full((1, 1), 1e-5)})
    with OfficialFaces(files[0], blind) as detector:
        assert detector.detect(np.zeros((544, 320, 3), np.uint8)) == []


def test_missing_and_wrong_files_are_errors(files, tmp_path, monkeypatch):
    (tmp_path / "text.onnx").write_text("not a network")
    for pair in [("missing.onnx", files[1]), (str(tmp_path / "text.onnx"), files[1]), files[::-1]]:
        with pytest.raises(ConfigError, match=r"\.onnx"):
            OfficialFaces(*pair)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match="onnxruntime"):
        OfficialFaces(*files)


def test_one_file_of_two_is_an_error():
    with pytest.raises(ConfigError, match="landmark_model"):
        DrivingConfig(detection_model="face_det.onnx")
    with pytest.raises(ConfigError, match="detection_model"):
        DrivingConfig(landmark_model="face_landmark.onnx")
