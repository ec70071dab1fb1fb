"""Amazon reviews: the JSON lines of the 2018 and 2023 releases, with their metadata.

Facts of the formats: https://nijianmo.github.io/amazon (2018: reviewerID, asin, overall,
unixReviewTime; asin, title, category) and https://amazon-reviews-2023.github.io (2023: user_id,
parent_asin, rating, timestamp in milliseconds; parent_asin, title, categories). It must not know
what the values are worth.
"""

import html
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fellray.platform.errors import FellrayError
from fellray.platform.json_lines import read_first, read_lines
from fellray.platform.tables import Source, drop_untitled, first_titled

_ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
_META = "meta_"
# Some 2018 titles are a piece of the shop's page; its scripts begin with a look at the clock.
_PAGE_SCRIPT = "getTime("


@dataclass(frozen=True)
class _Release:
    """What a release calls its fields."""

    user: str
    item: str
    rating: str
    time: str
    per_second: int
    categories: str


_RELEASES = {
    "2018": _Release("reviewerID", "asin", "overall", "unixReviewTime", 1, "category"),
    "2023": _Release("user_id", "parent_asin", "rating", "timestamp", 1000, "categories"),
}


def find_reviews(source: Path) -> Path | None:
    """The file of reviews that a path is or holds; None where there is none.

    Raises:
        FellrayError: a folder with metadata holds no reviews, or several files of them.
    """
    if source.name.endswith(_ENDINGS) and not source.is_dir():
        return source
    files = sorted(source.glob("*.json*")) if source.is_dir() else []
    files = [file for file in files if file.name.endswith(_ENDINGS)]
    if not any(file.name.startswith(_META) for file in files):
        return None
    reviews = [file for file in files if not file.name.startswith(_META)]
    if len(reviews) != 1:
        names = ", ".join(file.name for file in reviews) or "none"
        raise FellrayError(
            f"{source}: one file of reviews must lie beside {_META}*.json, there is {names}; give "
            "the one to read as data.source, and its metadata as data.items"
        )
    return reviews[0]


def open_reviews(file: Path, metadata: Path | None) -> Source:
    """Reviews and the products they are about.

    Titles and categories lose HTML's escapes (`&amp;`); a title that is a piece of a page's script
    counts as none. Of an item with several rows the first with a title counts. Items without
    metadata or without a title are left out and counted.

    Args:
        metadata: by default `meta_NAME.json` and the like, beside the reviews in `NAME.json`
            or `NAME_5.json`.

    Raises:
        FellrayError: a file is missing, cut off or of neither release, or a line is no JSON or
            lacks a field; the line is named.
    """
    release = _RELEASES[_find_release(file)]
    metadata = metadata or _find_metadata(file)
    text, number = pa.string(), pa.float64()
    rows = read_lines(
        file,
        {release.user: text, release.item: text, release.time: pa.int64(), release.rating: number},
        (release.user, release.item, release.time),
    ).rename_columns(["user_id", "item_id", "timestamp", "rating"])
    if release.per_second > 1:
        # a second holds many rows: the finer clock orders them
        moment = rows["timestamp"]
        seconds = pa.chunked_array([moment.to_numpy() // release.per_second])
        rows = rows.set_column(2, "timestamp", seconds).append_column("seq", moment)
    items = read_lines(
        metadata,
        {release.item: text, "title": text, release.categories: pa.list_(text)},
        (release.item,),
    ).combine_chunks()
    items = pa.table(
        {
            "item_id": items[0],
            "title": _clean_titles(items[1]),
            "categories": _join_categories(items[2]),
        }
    )
    rows, items, left_out = drop_untitled(rows, file, first_titled(items), metadata)
    return Source(rows, items, "unix_seconds", str(file), str(metadata), left_out=left_out)


def _find_metadata(file: Path) -> Path:
    name = re.sub(r"\.jsonl?(\.gz)?$", "", file.name)
    names = (name, re.sub(r"_\d+$", "", name))  # NAME_5: the 5-core of NAME
    found = [
        file.with_name(f"{_META}{one}{ending}")
        for one in names
        for ending in _ENDINGS
        if file.with_name(f"{_META}{one}{ending}").is_file()
    ]
    if not found:
        raise FellrayError(
            f"{file}: no metadata lie beside it ({_META}{names[-1]}.json and the like); titles are "
            "what the model reads: name their file with data.items=<file>"
        )
    return found[0]


def _find_release(file: Path) -> str:
    """By the fields of the first line."""
    fields = read_first(file)
    for name, release in _RELEASES.items():
        if {release.user, release.item} <= fields:
            return name
    forms = " or ".join(f"{r.user} and {r.item} ({name})" for name, r in _RELEASES.items())
    has = f"has {', '.join(sorted(fields)[:8])}" if fields else "is no JSON object"
    raise FellrayError(
        f"{file}: is no file of Amazon reviews: its first line must have {forms}, and {has}"
    )


def _clean_titles(titles: pa.ChunkedArray) -> pa.ChunkedArray:
    titles = titles.fill_null("")
    titles = pc.if_else(pc.match_substring(titles, _PAGE_SCRIPT), "", titles)
    escaped = pc.match_substring(titles, "&")
    plain = [html.unescape(one) for one in titles.filter(escaped).to_pylist()]
    titles = pc.replace_with_mask(titles, escaped.combine_chunks(), pa.array(plain, pa.string()))
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(titles, r"\s+", " "))


def _join_categories(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    """Each item's categories joined by `|`; each different one is cleaned once."""
    names = lists.combine_chunks().flatten().dictionary_encode()
    clean = [_clean_category(one) for one in names.dictionary.to_pylist()]
    flat = pa.array(clean, pa.string()).take(names.indices)
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy()
    offsets = pa.array(np.r_[0, np.cumsum(lengths)].astype(np.int32))
    joined = pc.binary_join(pa.ListArray.from_arrays(offsets, flat), "|")
    return pc.utf8_trim(pc.replace_substring_regex(joined, r"\|+", "|"), "|")


def _clean_category(text: str | None) -> str:
    """Nothing where it is markup, as the ends of some 2018 lists are."""
    if not text or "<" in text:
        return ""
    return " ".join(html.unescape(text).replace("|", "/").split())
