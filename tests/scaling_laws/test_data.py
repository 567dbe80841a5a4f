"""The published points and the reading of others."""

import numpy as np
import pytest

from parscale.scaling_laws import published, published_models, read_points
from parscale.scaling_laws.data import check_points, read_csv, size_groups

PLAIN_PARAMS = [535_813_376, 693_753_856, 1_088_376_320, 1_571_472_384, 2_774_773_760, 4_353_203_200]
WIDTHS = [896, 1024, 1280, 1536, 2048, 2560]


def added(hidden: int, streams: int) -> int:
    """`P*H*H + H + H*P + P + layers*2*P*G*T*D` with 36 layers, 2 key/value heads of H/16, 48 prefix tokens."""
    if streams == 1:
        return 0
    return streams * hidden**2 + hidden + hidden * streams + streams + 36 * 2 * streams * 2 * 48 * (hidden // 16)


@pytest.mark.parametrize("corpus", ["stack", "pile"])
def test_published_params_are_the_plain_ones_with_those_that_streams_add(corpus):
    points = published(corpus)
    expected = [n + added(h, p) for p in (1, 2, 4, 8) for n, h in zip(PLAIN_PARAMS, WIDTHS, strict=True)]
    assert points.params.tolist() == expected
    assert points.streams.tolist() == [p for p in (1, 2, 4, 8) for _ in WIDTHS]


# The paper's table: one row for each P, one column for each size.
LOSSES = {
    "stack": """
        1.1722 1.1496 1.1131 1.0817 1.0451 1.0213
        1.1507 1.1262 1.0940 1.0623 1.0244 1.0025
        1.1354 1.1124 1.0808 1.0490 1.0126 0.9906
        1.1231 1.0997 1.0688 1.0383 1.0016 0.9794""",
    "pile": """
        2.1113 2.0671 2.0027 1.9539 1.8876 1.8451
        2.0772 2.0363 1.9730 1.9266 1.8610 1.8137
        2.0544 2.0128 1.9509 1.9040 1.8394 1.7938
        2.0364 1.9933 1.9318 1.8856 1.8218 1.7772""",
}


@pytest.mark.parametrize("corpus", LOSSES)
def test_published_losses_are_the_papers(corpus):
    assert published(corpus).losses.tolist() == [float(digits) for digits in LOSSES[corpus].split()]


def test_published_points_are_fresh_arrays():
    published("stack").losses[0] = 0
    assert published("stack").losses[0] == 1.1722


def test_unknown_corpus_is_refused():
    with pytest.raises(ValueError, match=r"no published corpus 'c4'; give one of 'stack', 'pile'"):
        published("c4")


def test_published_models_are_complete_configurations():
    models = published_models()
    assert list(models) == ["0.5B", "0.7B", "1.1B", "1.6B", "2.8B", "4.4B"]
    assert [model["hidden_size"] for model in models.values()] == WIDTHS


def test_sizes_are_grouped_by_backbone():
    points = published("stack")
    assert size_groups(points).tolist() == [0, 1, 2, 3, 4, 5] * 4
    some = check_points([100, 200, 103, 400], [1, 1, 2, 2], [3.0, 2.0, 2.9, 1.5])
    assert size_groups(some).tolist() == [0, 1, 0, 1]
    ragged = check_points([100, 200, 400, 103, 206], [1, 1, 1, 2, 2], [3.0, 2.0, 1.5, 2.9, 1.9])
    assert size_groups(ragged).tolist() == [0, 1, 2, 0, 1]
    near = check_points([1.00e6, 1.06e6, 1.06e6], [1, 1, 2], [3.0, 2.9, 2.8])
    assert size_groups(near).tolist() == [0, 1, 1]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_round_trip(tmp_path):
    path = write(tmp_path / "runs.csv", "\ufeff# a note\nname,loss, params ,streams\n\na,1.5,1e6,1\nb,1.4,1e6,2\n")
    points = read_points(path)
    assert points.params.tolist() == [1e6, 1e6]
    assert points.streams.tolist() == [1, 2]
    assert points.losses.tolist() == [1.5, 1.4]


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.csv does not exist; give a CSV file"):
        read_points(tmp_path / "none.csv")
    binary = tmp_path / "image.csv"
    binary.write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not a text file; give a CSV file"):
        read_csv(binary)


@pytest.mark.parametrize(
    ("params", "streams", "losses", "message"),
    [
        ([1, 2], [1], [1, 1], "got 2 params, 1 streams, 2 losses; give one of each for every run"),
        ([1, np.inf], [1, 1], [1, 1], "params of point 2 is inf"),
        ([1, 2], [1, 1], [1, np.nan], "losses of point 2 is nan"),
        ([1, 2], [1, 0], [1, 1], "streams of point 2 is 0"),
        ([1, 2], [1, 2.5], [1, 1], "streams of point 2 is 2.5; P is a whole number"),
        (["a"], [1], [1], r"params must be numbers \(non-embedding parameters\); got \['a'\]"),
    ],
)
def test_bad_points_are_refused_by_name(params, streams, losses, message):
    with pytest.raises(ValueError, match=message):
        check_points(params, streams, losses)


def test_equal_losses_of_different_runs_are_no_repeats():
    check_points([1, 2], [1, 1], [1.5, 1.5])
    check_points([1, 1], [1, 1], [1.5, 1.5], tokens=[10, 20])
