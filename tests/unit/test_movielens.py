"""MovieLens' folders, in the exact forms that GroupLens gives out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fellray.platform import interactions as data
from fellray.platform.data_config import DataConfig
from fellray.platform.errors import FellrayError

RATINGS_1M = "2::1193::5::978300760\n1::661::3::978302109\n1::1193::4::978301968\n"
MOVIES_1M = (
    "661::Léon: The Professional (1994)::Crime|Drama\n"
    "1193::One Flew Over the Cuckoo's Nest (1975)::Drama\n"
    "7::Nobody Saw It (2000)::(no genres listed)\n"
)
USERS_1M = "1::F::1::10::48067\n2::M::56::16::55117-1234\n3::M::25::15::55117\n"
RATINGS_32M = "userId,movieId,rating,timestamp\n1,17,4.0,944249077\n1,25,1.5,944250228\n2,25,5,9\n"
MOVIES_32M = (
    "movieId,title,genres\n17,Sense and Sensibility (1995),Drama|Romance\n"
    '25,"Nest, ""The"" (1995)",(no genres listed)\n'
)


def read(folder: Path, **options: Any) -> data.Interactions:
    return data.read(DataConfig(source=str(folder), k_core=1).model_copy(update=options))


def ml_1m(folder: Path, **changed: str) -> Path:
    files = {"ratings": RATINGS_1M, "movies": MOVIES_1M, "users": USERS_1M} | changed
    for name, text in files.items():
        (folder / f"{name}.dat").write_bytes(text.encode("latin-1"))
    return folder


def ml_32m(folder: Path, ratings: str = RATINGS_32M, movies: str = MOVIES_32M) -> Path:
    (folder / "ratings.csv").write_text(ratings, encoding="utf-8")
    (folder / "movies.csv").write_text(movies, encoding="utf-8")
    return folder


def test_ml_1m_is_read_with_its_users(tmp_path: Path) -> None:
    got = read(ml_1m(tmp_path))
    assert got.user_id.tolist() == [1, 1, 2]
    assert got.item_id.tolist() == [1193, 661, 1193]  # by time
    assert got.timestamp.tolist() == [978301968, 978302109, 978300760]
    assert got.timestamp_kind == "unix_seconds"
    assert got.rating is not None
    assert got.rating.tolist() == [4, 3, 5]
    assert got.items.to_pydict() == {
        "item_id": [7, 661, 1193],
        "title": [
            *("Nobody Saw It (2000)", "Léon: The Professional (1994)"),
            "One Flew Over the Cuckoo's Nest (1975)",
        ],
        "categories": ["", "Crime|Drama", "Drama"],
    }
    assert got.users is not None
    assert got.users.slice(0, 2).to_pydict() == {
        "user_id": [1, 2],
        "gender": ["F", "M"],
        "age": [1, 56],
        "occupation": [10, 16],
        "zip_code": ["48067", "55117-1234"],
    }
    assert not got.left_out


def test_ml_10m_has_half_stars_utf_8_and_no_users(tmp_path: Path) -> None:
    ml_1m(tmp_path, ratings="1::122::4.5::838985046\n")
    (tmp_path / "users.dat").unlink()
    movies = "122::Amélie (Fabuleux destin d'Amélie Poulain, Le) (2001)::Comedy\n"
    (tmp_path / "movies.dat").write_text(movies, encoding="utf-8")
    got = read(tmp_path)
    assert got.items["title"].to_pylist() == [
        "Amélie (Fabuleux destin d'Amélie Poulain, Le) (2001)"
    ]
    assert got.rating is not None
    assert got.rating.tolist() == [4.5]
    assert got.users is None


def test_ml_32m_has_quoted_titles_and_half_stars(tmp_path: Path) -> None:
    got = read(ml_32m(tmp_path))
    assert got.user_id.tolist() == [1, 1, 2]
    assert got.item_id.tolist() == [17, 25, 25]
    assert got.rating is not None
    assert got.rating.tolist() == [4, 1.5, 5]
    assert got.rating.dtype == np.float32
    assert got.items["title"].to_pylist() == ["Sense and Sensibility (1995)", 'Nest, "The" (1995)']
    assert got.items["categories"].to_pylist() == ["Drama|Romance", ""]
    assert got.users is None


def test_ml_100k_has_users_where_u_user_lies_beside(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("7\t2\t5\t100\n")
    (tmp_path / "u.item").write_text("2|Up||||" + "0|1" + "|0" * 17 + "\n")
    assert read(tmp_path).users is None
    (tmp_path / "u.user").write_text("7|24|M|technician|85711\n")
    users = read(tmp_path).users
    assert users is not None
    assert users.to_pylist() == [
        {"user_id": 7, "age": 24, "gender": "M", "occupation": "technician", "zip_code": "85711"}
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ratings": "1::2::3\n"}, r"ratings\.dat: is not UserID::.*Row #1: Expected 4 columns"),
        ({"ratings": RATINGS_1M + "1::x::3::4\n"}, r"ratings\.dat: .*Row #4.*int64.*'x'"),
        ({"movies": ""}, r"movies\.dat: is empty"),
        ({"movies": "1193:Heat:War\n"}, r"movies\.dat: .*Row #1: Expected 3 columns, got 1"),
        ({"movies": "1193::Heat::War\n"}, r"item_id 661 \(1 in all\) not in .*movies\.dat"),
        ({"movies": MOVIES_1M + "8::::War\n"}, r"movies\.dat: no title for item_id 8"),
        ({"users": USERS_1M + "1::F::1::10::4\n"}, r"users\.dat: user_id 1 occurs more than once"),
        ({"users": "1::F::young::10::4\n"}, r"users\.dat: .*Row #1.*'young'"),
    ],
)
def test_bad_dat_files_name_the_file_and_the_row(
    changed: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FellrayError, match=message):
        read(ml_1m(tmp_path, **changed))


@pytest.mark.parametrize(
    ("ratings", "movies", "message"),
    [
        ("userId,movieId,rating\n1,2,3\n", MOVIES_32M, r"ratings\.csv: .*'timestamp'.*not exist"),
        (RATINGS_32M + "3,17\n", MOVIES_32M, r"ratings\.csv: .*Row #5: Expected 4 columns, got 2"),
        (RATINGS_32M + "3,17,good,1\n", MOVIES_32M, r"ratings\.csv: .*Row #5.*'good'"),
        (RATINGS_32M, "", r"movies\.csv: .*Empty CSV file"),
        ("userId,movieId,rating,timestamp\n", MOVIES_32M, r"ratings\.csv: has no rows"),
        (RATINGS_32M, "movieId,title,genres\n17,Up,\n", r"item_id 25 .*not in .*movies\.csv"),
    ],
)
def test_bad_csv_files_name_the_file_and_the_row(
    ratings: str, movies: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(FellrayError, match=message):
        read(ml_32m(tmp_path, ratings, movies))


def test_ml_1m_without_its_movies(tmp_path: Path) -> None:
    (ml_1m(tmp_path) / "movies.dat").unlink()
    with pytest.raises(FellrayError, match=r"movies\.dat: does not exist"):
        read(tmp_path)
