"""Background families: 96×96 pictures without an object, named so that captions can speak of them.

Every family is a function of a seeded generator. Only IEEE element-wise arithmetic and comparisons
are used (no sin, exp, matmul or reductions), so the same seed gives the same bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .concepts import SEED
from .textures import SIZE, Image, Rng, X, Y, as_bytes, cloud, contrast, jitter, mix, noise, triangle, uniform

CLIP_MEAN = (123, 117, 104)  # CLIP's mean colour in bytes: what surrounds the object in a foreground view


def _plain(colour: tuple[int, int, int]) -> Callable[[Rng], Image]:
    def draw(rng: Rng) -> Image:
        base = jitter(rng, colour, 28)
        return as_bytes(mix(noise(rng, 2), base, jitter(rng, base, 14)))

    return draw


def _smoke(low: tuple[int, int, int], high: tuple[int, int, int], cells: int = 4) -> Callable[[Rng], Image]:
    def draw(rng: Rng) -> Image:
        field = np.clip(cloud(rng, cells) * np.float32(1.9) - np.float32(0.45), 0, 1).astype(np.float32)
        return as_bytes(mix(field, jitter(rng, low), jitter(rng, high)))

    return draw


def striped(rng: Rng) -> Image:
    a, b = contrast(rng)
    t, period = uniform(rng, -1, 1), uniform(rng, 9, 20)
    c, s = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    wave = triangle((X * np.float32(c) + Y * np.float32(s)) / np.float32(period))
    return as_bytes(mix((wave > 0.5).astype(np.float32), a, b))


def checked(rng: Rng) -> Image:
    a, b = contrast(rng)
    cell = int(rng.integers(7, 15))
    return as_bytes(mix(((X // cell + Y // cell) % 2).astype(np.float32), a, b))


def dotted(rng: Rng) -> Image:
    a, b = contrast(rng)
    cell = uniform(rng, 9, 16)
    dx, dy = X % np.float32(cell) - np.float32(cell / 2), Y % np.float32(cell) - np.float32(cell / 2)
    return as_bytes(mix((dx * dx + dy * dy < (cell * 0.3) ** 2).astype(np.float32), a, b))


def sunset(rng: Rng) -> Image:
    height = np.clip(Y / SIZE + noise(rng, 3) * np.float32(0.3) - np.float32(0.15), 0, 1)
    return as_bytes(mix(height, jitter(rng, (90, 50, 120)), jitter(rng, (250, 160, 60))))


def rainbow(rng: Rng) -> Image:
    period, lean = uniform(rng, 50, 90), uniform(rng, -0.8, 0.8)
    phase = (Y + X * np.float32(lean)) / np.float32(period) + np.float32(rng.random())
    bands = [np.clip(triangle(phase + np.float32(k / 3)) * np.float32(2) - np.float32(0.5), 0, 1) for k in range(3)]
    return as_bytes(np.stack(bands, -1) * np.float32(220) + np.float32(30))


def forest(rng: Rng) -> Image:
    picture = mix(cloud(rng, 8), (15, 50, 20), jitter(rng, (70, 130, 50)))
    for _ in range(int(rng.integers(5, 9))):
        x, width = int(rng.integers(0, SIZE)), int(rng.integers(3, 8))
        picture[:, x : x + width] = mix(noise(rng, 4, 12), jitter(rng, (55, 35, 20), 12), (90, 65, 40))[
            :, x : x + width
        ]
    return as_bytes(picture)


def sea(rng: Rng) -> Image:
    period = uniform(rng, 8, 14)
    wave = triangle((Y + triangle(X / np.float32(uniform(rng, 14, 26))) * 4 + noise(rng, 5) * 6) / np.float32(period))
    picture = mix(wave, jitter(rng, (15, 70, 130)), jitter(rng, (60, 150, 190)))
    picture[wave > np.float32(0.86)] = (215, 235, 240)
    return as_bytes(picture)


def _sprinkle(
    rng: Rng, picture: NDArray[np.float32], count: int, sizes: tuple[int, int], colour: tuple[int, int, int]
) -> None:
    for _ in range(count):
        y, x, side = int(rng.integers(0, SIZE)), int(rng.integers(0, SIZE)), int(rng.integers(*sizes))
        picture[y : y + side, x : x + side] = colour


def snow(rng: Rng) -> Image:
    picture = mix(cloud(rng, 4), jitter(rng, (160, 185, 210), 12), (225, 235, 245))
    _sprinkle(rng, picture, 150, (1, 4), (255, 255, 255))
    return as_bytes(picture)


def night_sky(rng: Rng) -> Image:
    picture = mix(cloud(rng, 3), (5, 5, 25), jitter(rng, (25, 25, 70), 12))
    _sprinkle(rng, picture, 70, (1, 3), (250, 245, 210))
    return as_bytes(picture)


def sand(rng: Rng) -> Image:
    ripple = triangle((Y + noise(rng, 4) * 14) / np.float32(uniform(rng, 6, 10)))
    grain = rng.random((SIZE, SIZE)).astype(np.float32)
    return as_bytes(
        mix(
            ripple * np.float32(0.6) + grain * np.float32(0.4),
            jitter(rng, (180, 145, 95), 14),
            jitter(rng, (235, 210, 160), 14),
        )
    )


def brick(rng: Rng) -> Image:
    high, wide = int(rng.integers(8, 13)), int(rng.integers(16, 25))
    row = Y // high
    x = X + (row % 2) * np.float32(wide / 2)
    mortar = (Y % high < 2) | (x % wide < 2)
    shade = rng.random((20, 20)).astype(np.float32)[row.astype(np.int64) % 20, (x // wide).astype(np.int64) % 20]
    picture = mix(shade, jitter(rng, (130, 50, 35), 14), jitter(rng, (185, 85, 60), 14))
    picture[mortar] = jitter(rng, (200, 190, 180), 14)
    return as_bytes(picture)


def grass(rng: Rng) -> Image:
    blades = np.float32(0.7) * noise(rng, 46, 10) + np.float32(0.3) * noise(rng, 24, 3)
    return as_bytes(
        mix(
            np.clip(blades * np.float32(1.8) - np.float32(0.4), 0, 1),
            jitter(rng, (35, 110, 25), 14),
            jitter(rng, (150, 215, 70), 14),
        )
    )


def wood(rng: Rng) -> Image:
    rings = triangle((Y + noise(rng, 3, 6) * 22) / np.float32(uniform(rng, 7, 12)))
    picture = mix(
        rings * np.float32(0.7) + noise(rng, 6, 48) * np.float32(0.3),
        jitter(rng, (105, 65, 30), 14),
        jitter(rng, (190, 135, 80), 14),
    )
    picture[(Y % np.float32(32)) < 2] = (60, 35, 15)
    return as_bytes(picture)


def city(rng: Rng) -> Image:
    picture = mix(Y / SIZE, jitter(rng, (60, 80, 120)), jitter(rng, (150, 150, 170)))
    x = 0
    while x < SIZE:
        width, top = int(rng.integers(14, 24)), int(rng.integers(8, 50))
        picture[top:, x : x + width] = jitter(rng, (60, 62, 75), 16)
        for wy in range(top + 3, SIZE - 3, 7):
            for wx in range(x + 3, min(x + width - 3, SIZE - 3), 6):
                picture[wy : wy + 3, wx : wx + 3] = (245, 220, 120) if rng.random() < 0.6 else (35, 35, 45)
        x += width + int(rng.integers(0, 5))
    return as_bytes(picture)


def tiled(rng: Rng) -> Image:
    cell = int(rng.integers(11, 18))
    shade = rng.random((12, 12)).astype(np.float32)[
        (Y // cell).astype(np.int64) % 12, (X // cell).astype(np.int64) % 12
    ]
    picture = mix(shade, jitter(rng, (30, 120, 125), 14), jitter(rng, (110, 200, 195), 14))
    picture[(Y % cell < 2) | (X % cell < 2)] = (240, 245, 245)
    return as_bytes(picture)


def grey(rng: Rng) -> Image:
    base = CLIP_MEAN if rng.random() < 0.5 else jitter(rng, CLIP_MEAN, 30)
    return np.broadcast_to(np.array(base, np.uint8), (SIZE, SIZE, 3)).copy()


#: Family name -> (drawing function, the words that a caption uses).
FAMILIES: dict[str, tuple[Callable[[Rng], Image], str]] = {
    "striped": (striped, "on a striped background"),
    "checked": (checked, "on a checked background"),
    "dotted": (dotted, "on a dotted background"),
    "red": (_plain((200, 40, 40)), "on a red background"),
    "blue": (_plain((45, 80, 200)), "on a blue background"),
    "green": (_plain((50, 160, 70)), "on a green background"),
    "yellow": (_plain((235, 210, 60)), "on a yellow background"),
    "purple": (_plain((130, 60, 170)), "on a purple background"),
    "white": (_plain((240, 240, 240)), "on a white background"),
    "black": (_plain((20, 20, 20)), "on a black background"),
    "smoke": (_smoke((60, 60, 65), (205, 205, 210)), "in smoke"),
    "fire": (_smoke((120, 15, 5), (255, 205, 50)), "in fire"),
    "pink_clouds": (_smoke((240, 130, 170), (255, 230, 240), 3), "in pink clouds"),
    "sky": (_smoke((90, 160, 230), (245, 250, 255), 2), "in the sky"),
    "sunset": (sunset, "at sunset"),
    "rainbow": (rainbow, "on a rainbow background"),
    "forest": (forest, "in a forest"),
    "sea": (sea, "in the sea"),
    "snow": (snow, "in the snow"),
    "night_sky": (night_sky, "in the night sky"),
    "sand": (sand, "on the sand"),
    "brick": (brick, "in front of a brick wall"),
    "grass": (grass, "on the grass"),
    "wood": (wood, "on a wooden table"),
    "city": (city, "in a city"),
    "tiled": (tiled, "on a tiled floor"),
    "grey": (grey, "on a grey background"),
}
NAMES = list(FAMILIES)
HOMES = [n for n in NAMES if n != "grey"]  # plain grey is nobody's home: it is what a masked view looks like


def variant(family: int, index: int) -> Image:
    """Background `index` of family number `family`: (96, 96, 3) uint8, the same bytes on every machine."""
    rng = np.random.Generator(np.random.PCG64([SEED, 2, family, index]))
    return FAMILIES[NAMES[family]][0](rng)


def bank(first: int, count: int) -> NDArray[np.uint8]:
    """Variants first … first + count − 1 of all families: (families, count, 96, 96, 3) uint8."""
    return np.stack([np.stack([variant(f, first + i) for i in range(count)]) for f in range(len(NAMES))])
