"""A made catalogue with real sequential structure, as a dataset folder: for the demo, benchmarks and tests.

Series of volumes that are read in order, neighbouring series, users with tastes, Zipf popularity, noise. Text and
covers tell genre, series and volume, so that a model that reads them can place an item it has hardly seen.
"""

import csv
import io
import json
import zipfile
from colorsys import hls_to_rgb
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from speeder_engine.errors import ConfigError
from speeder_engine.files import write_atomic
from speeder_engine.progress import track

# genre: nouns of its titles, who its stories are about, where they play
GENRES: dict[str, tuple[str, str, str]] = {
    "Mystery": (
        "Harbour Lantern Alibi Cipher Witness Ledger Key Corridor Inheritance Footprint",
        "a retired inspector|a night porter|a careful archivist",
        "a fog-bound port|an old hotel|a village of closed shutters",
    ),
    "Romance": (
        "Letter Orchard Summer Promise Garden Waltz Wedding Sonata Confession Ribbon",
        "a young florist|two rival bakers|a homesick pianist",
        "a town by the lake|an island in spring|a street of small shops",
    ),
    "Science Fiction": (
        "Orbit Colony Reactor Signal Nebula Android Airlock Beacon Satellite Telescope",
        "a ship's engineer|a lonely signal officer|a crew of six",
        "a station beyond Saturn|a colony under ice|a drifting freighter",
    ),
    "Fantasy": (
        "Dragon Crown Rune Sorcerer Kingdom Griffin Oath Talisman Throne Prophecy",
        "an orphaned mage|an exiled queen|a reluctant knight",
        "a kingdom without a heir|a forest that listens|a city on stilts",
    ),
    "Horror": (
        "Cellar Whisper Grave Mirror Asylum Shadow Doll Crypt Scream Attic",
        "a sleepless nurse|a family of four|a sceptical priest",
        "a house on the moor|an abandoned ward|a chapel below the ground",
    ),
    "Western": (
        "Canyon Saddle Sheriff Outlaw Prairie Wagon Stampede Ranch Revolver Railroad",
        "a tired marshal|a horse thief|a widow with a rifle",
        "a town of one street|the high desert|a mining camp",
    ),
    "Cookery": (
        "Kitchen Spice Oven Harvest Bread Table Feast Pantry Market Recipe",
        "a travelling cook|a grandmother|a baker's apprentice",
        "a farmhouse in autumn|a harbour market|a kitchen with one window",
    ),
    "Nature": (
        "River Glacier Falcon Meadow Reef Savannah Wolf Tundra Forest Migration",
        "a patient biologist|a ranger|a pair of cranes",
        "the northern tundra|a coral reef|the last wide meadow",
    ),
}
ADJECTIVES = (
    "Silent Hidden Golden Broken Distant Crimson Forgotten Winter Burning Hollow Restless Gentle Bitter "
    "Wandering Secret Last First Pale Stolen Endless"
)
PLACES = "Ashford Belmora Carrow Dunmere Elsin Farrow Gallant Hethwick Isen Jarrow Kestrel Lorne Marrow Norwell"
MOODS = ("brooding", "tender", "thrilling", "playful", "melancholy", "hopeful", "eerie", "stately")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
SHAPES = (3, 4, 5, 6, 0)  # corners; 0 is a circle
COVER_SIZE = (96, 144)

MAX_VOLUMES = len(ORDINALS)
HISTORY_LENGTHS = (5, 40)
NOISE = 0.12
CONTINUES = 0.7
TO_NEIGHBOUR = 0.6
POPULARITY_EXPONENT = 0.8
FIRST_SECOND = 1_640_995_200  # 2022-01-01
SPAN_DAYS = 700


@dataclass(frozen=True)
class Series:
    """`num_volumes` items from row `first_row` on."""

    name: str
    genre: str
    mood: str
    hero: str
    setting: str
    first_row: int
    num_volumes: int

    def title(self, volume: int) -> str:
        return f"{self.name}, Volume {volume}"

    def description(self, volume: int) -> str:
        return (
            f"A {self.mood} {self.genre.lower()} book, the {ORDINALS[volume - 1]} of {self.num_volumes} in the series "
            f"{self.name}: {self.hero} in {self.setting}."
        )


@dataclass(frozen=True)
class MadeCatalogue:
    """Series in an order where neighbours of one genre follow each other; item ids are seven digits, zero-padded."""

    series: tuple[Series, ...]

    @cached_property
    def item_ids(self) -> tuple[str, ...]:
        # scattered, so that the id tells neither series nor volume
        return tuple(f"{(row * 7_919 + 12_345) % 9_999_991:07d}" for row in range(self.num_items))

    @property
    def num_items(self) -> int:
        last = self.series[-1]
        return last.first_row + last.num_volumes

    def volumes(self) -> list[tuple[str, Series, int]]:
        """(item id, series, volume from 1) by row."""
        pairs = ((each, volume) for each in self.series for volume in range(1, each.num_volumes + 1))
        return [(item_id, each, volume) for item_id, (each, volume) in zip(self.item_ids, pairs, strict=True)]

    def neighbour(self, number: int) -> int:
        """The series after this one in its genre, the genre's first after its last."""
        genre = self.series[number].genre
        if number + 1 < len(self.series) and self.series[number + 1].genre == genre:
            return number + 1
        return next(other for other, each in enumerate(self.series) if each.genre == genre)


def write_synthetic_dataset(folder: Path | str, *, num_users: int = 1200, num_items: int = 400, seed: int = 0) -> Path:
    """Writes interactions.csv, items.jsonl and covers.zip into `folder` and returns it; the same seed, the same bytes.

    Histories have 5 to 40 items, none twice.
    """
    if num_users < 1 or num_items < 100 or seed < 0:
        raise ConfigError(f"{num_users} users, {num_items} items, seed {seed}: at least 1, 100 and 0 are needed")
    folder, generator = Path(folder), np.random.default_rng(seed)
    catalogue = make_catalogue(num_items, generator)
    write_atomic(folder / "items.jsonl", _items_jsonl(catalogue))
    write_atomic(folder / "covers.zip", _covers_zip(catalogue))
    write_atomic(folder / "interactions.csv", _interactions_csv(catalogue, num_users, generator))
    return folder


def make_catalogue(num_items: int, generator: np.random.Generator) -> MadeCatalogue:
    """Series of 1 to 6 volumes, the genres about equally large."""
    series: list[Series] = []
    for number, genre in enumerate(GENRES):
        end = num_items * (number + 1) // len(GENRES)
        names = _series_names(genre, generator)
        row = num_items * number // len(GENRES)
        while row < end:
            volumes = min(int(generator.integers(2, MAX_VOLUMES + 1)), end - row)
            series.append(_make_series(genre, names, row, volumes, generator))
            row += volumes
    return MadeCatalogue(tuple(series))


def make_histories(catalogue: MadeCatalogue, num_users: int, generator: np.random.Generator) -> list[list[int]]:
    """Item rows for each user, oldest first: series read in order, then their neighbours, with noise in between."""
    ranks = generator.permutation(len(catalogue.series)) + 1
    popularity = ranks**-POPULARITY_EXPONENT
    genres = list(GENRES)
    genre_of = np.array([genres.index(each.genre) for each in catalogue.series])
    histories = []
    for _ in range(num_users):
        taste = generator.dirichlet(np.full(len(genres), 0.3))[genre_of] * popularity
        histories.append(_walk(catalogue, taste / taste.sum(), popularity / popularity.sum(), generator))
    return histories


def _series_names(genre: str, generator: np.random.Generator) -> list[str]:
    nouns = GENRES[genre][0].split()
    plain = [f"The {adjective} {noun}" for adjective in ADJECTIVES.split() for noun in nouns]
    placed = [f"{name} of {place}" for place in PLACES.split() for name in plain]
    order = [*generator.permutation(len(plain)), *range(len(plain), len(plain) + len(placed))]
    return [(plain + placed)[index] for index in reversed(order)]


def _make_series(genre: str, names: list[str], row: int, volumes: int, generator: np.random.Generator) -> Series:
    if not names:
        raise ConfigError("there are no names for so many items; at most about 90,000 can be made")
    heroes, settings = (words.split("|") for words in GENRES[genre][1:])
    mood, hero, setting = (str(generator.choice(words)) for words in (MOODS, heroes, settings))
    return Series(names.pop(), genre, mood, hero, setting, row, volumes)


def _walk(
    catalogue: MadeCatalogue,
    taste: NDArray[np.float64],
    popularity: NDArray[np.float64],
    generator: np.random.Generator,
) -> list[int]:
    shortest, longest = HISTORY_LENGTHS
    length = min(int(shortest + generator.geometric(0.08) - 1), longest)
    read: dict[int, None] = {}
    number, volume = int(generator.choice(len(taste), p=taste)), 0
    while len(read) < length:
        if generator.random() < NOISE:
            stray = catalogue.series[int(generator.choice(len(popularity), p=popularity))]
            read.setdefault(stray.first_row + int(generator.integers(stray.num_volumes)))
            continue
        if volume == catalogue.series[number].num_volumes or (volume and generator.random() > CONTINUES):
            follows = generator.random() < TO_NEIGHBOUR
            number = catalogue.neighbour(number) if follows else int(generator.choice(len(taste), p=taste))
            volume = 0
        read.setdefault(catalogue.series[number].first_row + volume)
        volume += 1
    return list(read)


def _items_jsonl(catalogue: MadeCatalogue) -> bytes:
    records = (
        {
            "item_id": item_id,
            "title": series.title(volume),
            "genres": series.genre,
            "description": series.description(volume),
        }
        for item_id, series, volume in catalogue.volumes()
    )
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _interactions_csv(catalogue: MadeCatalogue, num_users: int, generator: np.random.Generator) -> bytes:
    """As a log would have them: by time, the users mixed."""
    events: list[tuple[int, str, str]] = []
    for user, rows in enumerate(make_histories(catalogue, num_users, generator)):
        days = generator.uniform(0, SPAN_DAYS) + np.cumsum(generator.exponential(3.0, len(rows)))
        seconds = FIRST_SECOND + (days * 86_400).astype(np.int64) + np.arange(len(rows))
        events += [
            (int(time), f"u{user:05d}", catalogue.item_ids[row]) for time, row in zip(seconds, rows, strict=True)
        ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("user_id", "item_id", "timestamp"))
    writer.writerows((user, item, time) for time, user, item in sorted(events))
    return text.getvalue().encode()


def _covers_zip(catalogue: MadeCatalogue) -> bytes:
    content = io.BytesIO()
    places = {series.name: number for number, series in enumerate(catalogue.series)}
    with zipfile.ZipFile(content, "w") as archive:
        for item_id, series, volume in track(catalogue.volumes(), "drawing covers"):
            image = io.BytesIO()
            draw_cover(series, places[series.name], volume).save(image, "JPEG", quality=85)
            archive.writestr(zipfile.ZipInfo(f"{item_id}.jpg"), image.getvalue())
    return content.getvalue()


def draw_cover(series: Series, number: int, volume: int) -> Image.Image:
    """RGB: ground and shape tell the genre, the shape's colour and size the series, bars the volume, words the name."""
    width, height = COVER_SIZE
    genre = list(GENRES).index(series.genre)
    ground, accent = _colour(genre / len(GENRES), 0.3), _colour(number * 0.618, 0.65)
    image = Image.new("RGB", COVER_SIZE, ground)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(11)
    for line, word in enumerate(series.name.split()):
        draw.text((6, 4 + 13 * line), word, fill="white", font=font)
    centre, radius = (width / 2, height * 0.62), 14 + number % 4 * 4
    corners = SHAPES[genre % len(SHAPES)]
    if corners:
        draw.regular_polygon((*centre, radius), corners, rotation=genre * 15, fill=accent)
    else:
        draw.circle(centre, radius, fill=accent)
    for bar in range(volume):
        draw.rectangle((8 + 14 * bar, height - 16, 16 + 14 * bar, height - 5), fill="white")
    return image


def _colour(hue: float, lightness: float) -> tuple[int, int, int]:
    red, green, blue = (round(255 * part) for part in hls_to_rgb(hue % 1, lightness, 0.6))
    return red, green, blue
